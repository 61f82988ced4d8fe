"""Orders hold for every way in which messages can be reordered, delayed and missing."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esper.bus.ordering import CausalOrder, GlobalOrder, StreamOrder
from esper.bus.protocol import Counts, Delivery, parse_id
from esper.messages import TickEnded
from tests.examples import examples


@st.composite
def traffic(draw):
    """Messages of up to three producers with causes among what was sent before, and an order of arrival."""
    producers = ["a", "b", "c"][: draw(st.integers(1, 3))]
    count = draw(st.integers(1, 30))
    sequence = dict.fromkeys(producers, 0)
    sent = []
    for moment in range(count):
        producer = draw(st.sampled_from(producers))
        sequence[producer] += 1
        causes = draw(st.lists(st.sampled_from(sent), max_size=2)) if sent else []
        after = tuple(f"{cause.producer}/{cause.id}" for cause in causes)
        sent.append(Delivery(f"1-{sequence[producer]}", TickEnded(tick=moment), 1, producer, float(moment // 2), after))
    return sent, draw(st.permutations(sent)), producers


def arrive(order, messages, gap_s=0.0):
    released, now = [], 0.0
    for message in messages:
        order.push(message, now)
        released += order.ready(now)
        now += gap_s
    return released, now


def keep_stream_order(released):
    last = {}
    for delivery in released:
        assert parse_id(delivery.id) > last.get(delivery.producer, (0, 0))
        last[delivery.producer] = parse_id(delivery.id)


@given(traffic())
def test_stream_order_holds_and_loses_nothing_however_messages_arrive(traffic):
    sent, arrival, _ = traffic
    released, _ = arrive(StreamOrder(10.0, Counts()), arrival)
    keep_stream_order(released)
    assert sorted(map(id, released)) == sorted(map(id, sent))


@given(traffic(), st.data())
def test_a_missing_message_holds_its_stream_for_a_bounded_time_and_is_counted(traffic, data):
    sent, arrival, _ = traffic
    missing = data.draw(st.sampled_from(sent))
    counts = Counts()
    order = StreamOrder(10.0, counts)
    released, now = arrive(order, [message for message in arrival if message is not missing])
    after = [m for m in sent if m.producer == missing.producer and parse_id(m.id) > parse_id(missing.id)]
    assert not any(message in released for message in after)
    released += order.ready(now + 10.0)
    keep_stream_order(released)
    assert len(released) == len(sent) - 1
    assert counts.snapshot()["gaps"] == (1 if after else 0)
    order.push(missing, now + 11)
    assert order.ready(now + 11) == [missing]
    assert counts.snapshot()["late"] == (1 if after else 0)


@given(traffic())
def test_global_order_is_the_merge_by_the_senders_clocks(traffic):
    sent, arrival, producers = traffic
    order = GlobalOrder(10.0, Counts(), tuple(producers))
    released, now = arrive(order, arrival)
    released += order.ready(now + 30.0)
    released += order.ready(now + 60.0)
    assert released == sorted(sent, key=lambda m: (m.time, m.producer, parse_id(m.id)))


@given(traffic())
def test_before_the_hold_runs_out_nothing_overtakes_the_watermark(traffic):
    _, arrival, producers = traffic
    order = GlobalOrder(10.0, Counts(), tuple(producers))
    seen = dict.fromkeys(producers, float("-inf"))
    for message in arrival:
        order.push(message, 0.0)
        seen[message.producer] = max(seen[message.producer], message.time)
        assert all(released.time <= min(seen.values()) for released in order.ready(0.0))


@given(traffic())
def test_causes_come_before_their_effects(traffic):
    sent, arrival, _ = traffic
    released, _ = arrive(CausalOrder(10.0, Counts()), arrival)
    assert sorted(map(id, released)) == sorted(map(id, sent))
    keep_stream_order(released)
    position = {f"{m.producer}/{m.id}": index for index, m in enumerate(released)}
    for index, message in enumerate(released):
        assert all(position[cause] < index for cause in message.after)


def test_an_effect_whose_cause_never_comes_is_held_for_a_bounded_time():
    counts = Counts()
    order = CausalOrder(10.0, counts)
    effect = Delivery("1-1", TickEnded(tick=0), 1, "a", 0.0, ("b/1-1",))
    order.push(effect, 0.0)
    assert order.ready(9.9) == []
    assert order.ready(20.0) == [effect]
    assert counts.snapshot()["late"] == 1


@pytest.mark.parametrize("effects", ["a", "b"])
def test_an_effect_of_a_cause_that_was_passed_over_is_counted_and_does_not_wait_again(effects):
    counts = Counts()
    order = CausalOrder(10.0, counts)
    sent = {number: Delivery(f"1-{number}", TickEnded(tick=number), 1, "a") for number in (1, 2, 3)}
    first = (4, 5) if effects == "a" else (1, 2)
    early = [Delivery(f"1-{number}", TickEnded(tick=number), 1, effects, 0.0, ("a/1-2",)) for number in first]
    for delivery in (sent[1], sent[3]):
        order.push(delivery, 0.0)
    assert order.ready(0.0) == [sent[1]]
    for delivery in early:
        order.push(delivery, 11.0)
    assert order.ready(11.0) == [sent[3], *early]
    assert counts.snapshot()["late"] == 2
    order.push(sent[2], 11.0)
    assert order.ready(11.0) == [sent[2]]
    assert counts.snapshot()["late"] == 3
    after = Delivery(f"1-{first[-1] + 1}", TickEnded(tick=9), 1, effects, 0.0, ("a/1-2",))
    order.push(after, 11.0)
    assert order.ready(11.0) == [after]
    assert counts.snapshot()["late"] == 3


def test_a_cause_that_never_came_in_an_earlier_start_of_its_producer_is_no_cause_that_came():
    counts = Counts()
    order = CausalOrder(10.0, counts)
    for id in ("1-1", "2-1"):
        order.push(Delivery(id, TickEnded(tick=0), 1, "a"), 0.0)
    order.push(Delivery("1-1", TickEnded(tick=0), 1, "b", 0.0, ("a/1-2",)), 0.0)
    assert len(order.ready(0.0)) == 3
    assert counts.snapshot()["late"] == 1


@pytest.mark.parametrize("kind", [StreamOrder, GlobalOrder, CausalOrder])
@given(traffic=traffic(), data=st.data())
@settings(max_examples=examples(30))
def test_whatever_is_missing_or_delayed_the_rest_comes_once_and_disorder_is_counted(kind, traffic, data):
    sent, arrival, _ = traffic
    missing = data.draw(st.lists(st.sampled_from(sent), max_size=3, unique_by=id))
    pauses = data.draw(st.lists(st.sampled_from([0.0, 0.1, 4.0, 11.0]), min_size=len(arrival), max_size=len(arrival)))
    counts, now = Counts(), 0.0
    order, released = kind(10.0, counts), []
    for message, pause in zip(arrival, pauses, strict=True):
        now += pause
        if not any(message is gone for gone in missing):
            order.push(message, now)
        released += order.ready(now)
    for _ in range(len(sent) + 2):
        now += 10.0
        released += order.ready(now)
    assert sorted(map(id, released)) == sorted(id(message) for message in sent if not any(message is gone for gone in missing))
    late, last, passed = counts.snapshot()["late"], {}, 0
    for delivery in released:
        passed += parse_id(delivery.id) < last.get(delivery.producer, (0, 0))
        last[delivery.producer] = max(last.get(delivery.producer, (0, 0)), parse_id(delivery.id))
    assert passed <= late
    if kind is CausalOrder:
        position = {f"{delivery.producer}/{delivery.id}": index for index, delivery in enumerate(released)}
        early = [any(position.get(cause, -1) > index for cause in message.after) for index, message in enumerate(released)]
        assert sum(early) <= late


@pytest.mark.parametrize("kind", [StreamOrder, GlobalOrder, CausalOrder])
@given(traffic=traffic(), data=st.data())
def test_nothing_waits_longer_than_the_hold_whatever_comes_before_it_and_when(kind, traffic, data):
    sent, arrival, producers = traffic
    missing = data.draw(st.lists(st.sampled_from(sent), max_size=3, unique_by=id))
    pauses = data.draw(st.lists(st.sampled_from([0.0, 0.1, 4.0, 9.0]), min_size=len(arrival), max_size=len(arrival)))
    order = GlobalOrder(10.0, Counts(), tuple(producers)) if kind is GlobalOrder else kind(10.0, Counts())
    due, released, now = {}, set(), 0.0

    def look(until):
        for moment in [*sorted({moment for moment in due.values() if now < moment <= until}), until]:
            released.update(map(id, order.ready(moment)))
            assert {number for number, last in due.items() if last <= moment} <= released

    for message, pause in zip(arrival, pauses, strict=True):
        look(now + pause)
        now += pause
        if not any(message is gone for gone in missing):
            order.push(message, now)
            due[id(message)] = now + 10.0
    look(now + 10.0)
    assert released == due.keys()


def test_each_late_message_with_a_lower_number_does_not_start_the_wait_anew():
    order = StreamOrder(10.0, Counts())
    messages = {number: Delivery(f"1-{number}", TickEnded(tick=number)) for number in (3, 5, 7, 9)}
    for moment, number in ((0.0, 9), (3.0, 7), (6.0, 5), (9.0, 3)):
        order.push(messages[number], moment)
        assert order.ready(moment) == []
    assert order.ready(10.0) == [messages[number] for number in (3, 5, 7, 9)]
