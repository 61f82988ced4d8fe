"""The suite that every bus backend passes, for pytest; a backend of your own is tested by it with a fixture named ``backend``.

.. code-block:: python

    class Mine(Backend):
        def make(self, settings):
            return MyBus(MemoryConfig(**settings), self.folder)

    class TestMyBus(BusConformance):
        @pytest.fixture
        def backend(self, tmp_path):
            with closing(Mine(tmp_path)) as backend:
                yield backend
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from esper.bus.ordering import in_order
from esper.bus.protocol import Bus, Consumer, Counts, Delivery, Fenced, Producer
from esper.messages import Metrics, Telemetry, TickEnded

QUICK: dict[str, Any] = {"claim_s": 0.3, "deliveries": 3}  # settings of the buses in the tests


class Backend:
    """Opens buses that see the same streams, as the processes of one run do.

    This class is for a bus that lives in one process: there is one, however often it is opened. A backend that reaches other
    processes overrides ``open``, so that each call gives a bus of its own, and ``die_holding``.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.opened: list[Bus] = []

    def make(self, settings: dict[str, Any]) -> Bus:
        """A new bus with these settings; fields of its configuration that are not named keep their defaults."""
        raise NotImplementedError

    def open(self, **settings: Any) -> Bus:
        """A bus with ``settings`` beside those of QUICK."""
        if not self.opened:
            self.opened.append(self.make(QUICK | settings))
        return self.opened[0]

    def die_holding(self, run: str, count: int) -> float:
        """Let the member ``dead`` of ``group`` take ``count`` events of ``run`` and die; the moment of its death in monotonic seconds.

        Within one process a dead member is one that reads no more.
        """
        assert len(self.open().consumer("events", run, "group", "dead").read(count, 1)) == count
        return time.monotonic()

    def close(self) -> None:
        """Close all buses, the first one last."""
        for bus in reversed(self.opened):
            bus.close()


def read_all(consumer: Consumer, wanted: int, seconds: float = 60.0, ack: bool = True) -> list[Delivery]:
    """Read until ``wanted`` messages have come or the time is up."""
    found: list[Delivery] = []
    deadline = time.monotonic() + seconds
    while len(found) < wanted and time.monotonic() < deadline:
        got = consumer.read(100, 0.05)
        if ack:
            consumer.ack(got)
        found += got
    return found


def ticks_of(deliveries: Iterable[Delivery]) -> list[int]:
    """The ticks of the events in ``deliveries``."""
    return [delivery.message.tick for delivery in deliveries if isinstance(delivery.message, (TickEnded, Metrics))]


def publish(producer: Producer, numbers: Iterable[int]) -> None:
    """Publish a TickEnded for every number, and wait until all are stored."""
    for number in numbers:
        producer.publish(TickEnded(tick=number))
    assert producer.flush(60)


class BusConformance:
    """The contract of ``esper.bus.protocol``, claim by claim. A subclass gives the fixture ``backend``."""

    @pytest.fixture
    def run(self, request: pytest.FixtureRequest) -> str:
        """A run name of the test's own, so that tests can share a server."""
        return str(request.node.name)

    @pytest.fixture
    def codec(self) -> str:
        """The telemetry codec to open buses with; empty for a backend that has no such setting."""
        return ""

    def test_messages_arrive_once_and_in_order(self, backend: Backend, run: str) -> None:
        bus = backend.open()
        consumer = bus.consumer("events", run, "group", "one")
        publish(bus.producer("events", run), range(500))
        assert ticks_of(read_all(consumer, 500)) == list(range(500))
        assert consumer.read(10, 0.05) == []

    def test_ids_count_from_one_without_a_hole_and_each_start_is_a_new_epoch(self, backend: Backend, run: str) -> None:
        bus = backend.open()
        consumer = bus.consumer("events", run, "group", "one")
        for _ in range(2):
            publish(bus.producer("events", run), range(3))
        assert [delivery.id for delivery in read_all(consumer, 6)] == ["1-1", "1-2", "1-3", "2-1", "2-2", "2-3"]
        assert bus.counts()["gaps"] == 0

    def test_a_newer_start_fences_the_old_producer(self, backend: Backend, run: str) -> None:
        bus = backend.open()
        old = bus.producer("events", run)
        publish(old, [1])
        new = backend.open().producer("events", run)
        publish(new, [2])
        with pytest.raises(Fenced):
            for _ in range(100):
                old.publish(TickEnded(tick=1000))
                old.flush(0.5)
        consumer = bus.consumer("events", run, "group", "one")
        assert ticks_of(read_all(consumer, 2)) == [1, 2]
        assert consumer.read(10, 0.1) == []

    def test_a_group_that_comes_late_reads_from_the_beginning(self, backend: Backend, run: str) -> None:
        bus = backend.open()
        publish(bus.producer("events", run), range(10))
        assert ticks_of(read_all(bus.consumer("events", run, "late", "one"), 10)) == list(range(10))

    def test_one_look_finds_what_a_producer_unknown_before_has_said(self, backend: Backend, run: str) -> None:
        bus = backend.open(claim_s=30.0)
        consumer = bus.consumer("events", run, "group", "one")
        publish(bus.producer("events", run, "known"), [1])
        assert ticks_of(consumer.read(10, 1)) == [1]
        publish(bus.producer("events", run, "new"), [2])
        time.sleep(0.25)
        assert ticks_of(consumer.read(10)) == [2]

    def test_every_group_gets_everything_and_within_a_group_one_member_does(self, backend: Backend, run: str) -> None:
        bus = backend.open()
        members = [bus.consumer("events", run, "shared", name) for name in "ab"]
        alone = bus.consumer("events", run, "alone", "one")
        publish(bus.producer("events", run), range(200))
        shared: list[int] = []
        while len(shared) < 200:
            for member in members:
                got = member.read(5)
                member.ack(got)
                shared += ticks_of(got)
        assert sorted(shared) == list(range(200))
        assert ticks_of(read_all(alone, 200)) == list(range(200))
        assert bus.counts()["gaps"] == 0

    def test_what_was_not_acknowledged_comes_again_to_the_same_name_at_once(self, backend: Backend, run: str) -> None:
        bus = backend.open(claim_s=3600.0)
        publish(bus.producer("events", run), range(5))
        first = bus.consumer("events", run, "group", "one")
        got = read_all(first, 5, ack=False)
        assert len(got) == 5
        first.ack(got[:2])
        first.close()
        again = read_all(backend.open(claim_s=3600.0).consumer("events", run, "group", "one"), 3)
        assert ticks_of(again) == [2, 3, 4]
        assert [delivery.deliveries for delivery in again] == [2, 2, 2]

    def test_a_killed_members_messages_are_claimed_after_its_claim_time(self, backend: Backend, run: str) -> None:
        bus = backend.open()
        publish(bus.producer("events", run), range(5))
        died = backend.die_holding(run, 5)
        alive = bus.consumer("events", run, "group", "alive")
        found = read_all(alive, 5)
        assert time.monotonic() - died > bus.config.claim_s / 2  # it has held them for a moment before it died
        assert ticks_of(found) == list(range(5))
        assert {delivery.deliveries for delivery in found} == {2}

    def test_a_message_never_acknowledged_becomes_a_dead_letter_after_n_deliveries(self, backend: Backend, run: str) -> None:
        bus = backend.open(claim_s=0.05)
        publish(bus.producer("events", run), [7])
        consumer = bus.consumer("events", run, "group", "one")
        seen: list[int] = []
        deadline = time.monotonic() + 60
        while not bus.dead_letters(run) and time.monotonic() < deadline:
            seen += [delivery.deliveries for delivery in consumer.read(10, 0.02)]
        assert seen == [1, 2, 3]
        (letter,) = bus.dead_letters(run)
        assert letter.message == TickEnded(tick=7)
        assert (letter.stream, letter.origin, letter.group, letter.deliveries) == ("events", "1-1", "group", 3)
        assert "3 times" in letter.reason
        assert consumer.read(10, 0.2) == []
        assert bus.counts()["dead_letters"] == 1

    def test_what_a_consumer_keeps_is_given_to_nobody_while_it_reads_and_counts_as_delivered_once(self, backend: Backend, run: str) -> None:
        bus = backend.open(deliveries=2, claim_s=0.8)
        publish(bus.producer("events", run), [7, 8])
        keeper = bus.consumer("events", run, "group", "keeper")
        other = backend.open(deliveries=2, claim_s=0.8).consumer("events", run, "group", "other")
        got = keeper.read(10, 1)
        keeper.keep(got)
        began = time.monotonic()
        while time.monotonic() - began < 3 * bus.config.claim_s:
            assert keeper.read(10, 0.01) == other.read(10, 0.01) == []
        assert bus.dead_letters(run) == []
        keeper.ack(got[:1])
        found: list[Delivery] = []
        while not found and time.monotonic() - began < 60:  # the keeper reads no more
            found = other.read(10, 0.05)
        assert list(zip(ticks_of(found), (delivery.deliveries for delivery in found), strict=True)) == [(8, 2)]
        assert keeper.read(10, 0.05) == []

    def test_a_dead_letter_can_be_replayed_and_purged(self, backend: Backend, run: str) -> None:
        bus = backend.open(claim_s=0.05)
        publish(bus.producer("events", run), [7, 8])
        consumer = bus.consumer("events", run, "group", "one")
        deadline = time.monotonic() + 60
        while len(bus.dead_letters(run)) < 2 and time.monotonic() < deadline:
            consumer.read(10, 0.02)
        first, second = bus.dead_letters(run)
        assert bus.replay(run, [first.id]) == 1
        (again,) = read_all(consumer, 1)
        assert (again.message, again.deliveries) == (TickEnded(tick=7), 1)
        assert bus.purge(run, [second.id]) == 1
        assert bus.dead_letters(run) == []
        assert consumer.read(10, 0.1) == []

    def test_acknowledging_twice_is_harmless(self, backend: Backend, run: str) -> None:
        bus = backend.open()
        publish(bus.producer("events", run), [1])
        consumer = bus.consumer("events", run, "group", "one")
        got = consumer.read(1, 1)
        consumer.ack(got)
        consumer.ack(got)
        assert consumer.read(1, 0.05) == []

    def test_several_producers_of_a_stream_keep_their_own_numbering(self, backend: Backend, run: str) -> None:
        bus = backend.open()
        for name in ("controller", "operator"):
            publish(bus.producer("commands", run, name), range(4))
        found = read_all(bus.consumer("commands", run, "group", "one"), 8)
        for name in ("controller", "operator"):
            own = [delivery for delivery in found if delivery.producer == name]
            assert [delivery.id for delivery in own] == ["1-1", "1-2", "1-3", "1-4"]
            assert ticks_of(own) == list(range(4))

    @pytest.mark.parametrize("order", ["none", "stream", "global", "causal"])
    def test_any_order_can_be_had_of_any_bus(self, backend: Backend, run: str, order: str) -> None:
        bus = backend.open(claim_s=30.0)
        producers = {name: bus.producer("events", run, name) for name in ("trainer", "observer")}
        plain = bus.consumer("events", run, "group", "one")
        consumer = in_order(plain, order, 0.2, Counts(), tuple(producers))
        for number in range(20):
            cause = (f"trainer/1-{number + 1}",)
            producers["observer"].publish(TickEnded(tick=number), cause)
            time.sleep(0.001)
            producers["trainer"].publish(TickEnded(tick=number))
        assert all(producer.flush(60) for producer in producers.values())
        found: list[Delivery] = []
        deadline = time.monotonic() + 60
        while len(found) < 40 and time.monotonic() < deadline:
            got = consumer.read(7, 0.05)
            consumer.ack(got)
            found += got
        assert len(found) == 40
        for name in producers:
            assert ticks_of([delivery for delivery in found if delivery.producer == name]) == list(range(20))
        names = list(zip((delivery.producer for delivery in found), ticks_of(found), strict=True))
        if order == "global":
            assert [delivery.time for delivery in found] == sorted(delivery.time for delivery in found)
        if order == "causal":
            assert all(names.index(("trainer", n)) < names.index(("observer", n)) for n in range(20))
        consumer.close()

    def test_what_an_order_holds_longer_than_the_claim_time_is_not_delivered_again(self, backend: Backend, run: str) -> None:
        bus = backend.open(deliveries=1)
        counts = Counts()
        consumer = in_order(bus.consumer("events", run, "group", "one"), "causal", 1.5, counts)
        effect = bus.producer("events", run)
        effect.publish(TickEnded(tick=1), ("somebody/1-1",))
        assert effect.flush(60)
        found: list[Delivery] = []
        deadline = time.monotonic() + 60
        while not found and time.monotonic() < deadline:
            found += consumer.read(10, 0.1)
        assert list(zip(ticks_of(found), (delivery.deliveries for delivery in found), strict=True)) == [(1, 1)]
        assert counts.snapshot()["late"] == 1
        assert bus.dead_letters(run) == []
        while not bus.dead_letters(run) and time.monotonic() < deadline:  # handed out, it has its claim time like any other
            assert consumer.read(10, 0.05) == []
        assert len(bus.dead_letters(run)) == 1
        consumer.close()

    @pytest.mark.parametrize("order", ["stream", "global", "causal"])
    def test_an_order_goes_on_after_a_restart_where_its_group_stands(self, backend: Backend, run: str, order: str) -> None:
        bus = backend.open()
        trainer, observer = (bus.producer("events", run, name) for name in ("trainer", "observer"))

        def start() -> tuple[Consumer, Counts]:
            counts = Counts()
            return in_order(backend.open().consumer("events", run, "group", "one"), order, 60.0, counts), counts

        consumer, _ = start()
        publish(trainer, range(5))
        consumer.ack(read_all(consumer, 5, ack=False)[:3])
        consumer.close()
        consumer, counts = start()
        observer.publish(TickEnded(tick=5), (f"trainer/{trainer.epoch}-2",))
        for producer, tick in ((observer, 6), (trainer, 7), (observer, 8), (trainer, 9)):  # global order keeps back the last
            publish(producer, [tick])
        assert {3, 4, 5, 6, 7} <= set(ticks_of(read_all(consumer, 6)))
        assert counts.snapshot()["gaps"] == counts.snapshot()["late"] == 0
        consumer.close()

    def test_runs_do_not_see_each_other(self, backend: Backend, run: str) -> None:
        bus = backend.open()
        publish(bus.producer("events", run + "/a"), [1])
        publish(bus.producer("events", run + "/b"), [2])
        consumer = bus.consumer("events", run + "/a", "group", "one")
        assert ticks_of(read_all(consumer, 1)) == [1]
        assert consumer.read(10, 0.1) == []

    def test_reading_waits_for_the_first_message_and_no_longer(self, backend: Backend, run: str) -> None:
        bus = backend.open()
        consumer = bus.consumer("events", run, "group", "one")
        producer = bus.producer("events", run)
        start = time.monotonic()
        assert consumer.read(1, 0.3) == []
        assert time.monotonic() - start > 0.25
        publish(producer, [1])
        assert ticks_of(consumer.read(10, 3600.0)) == [1]

    def test_messages_beyond_memory_wait_on_disk_and_come_back_in_order(self, backend: Backend, run: str) -> None:
        bus = backend.open(memory_mb=1, spool_mb=64, claim_s=60.0)
        consumer = bus.consumer("events", run, "group", "one")
        producer = bus.producer("events", run)
        big = {f"metric/{i}": float(i) for i in range(200)}
        for number in range(12_000):
            producer.publish(Metrics(tick=number, values=big) if number % 1000 == 0 else TickEnded(tick=number))
        assert producer.flush(60)
        assert ticks_of(read_all(consumer, 12_000, seconds=60)) == list(range(12_000))
        assert bus.counts()["dropped"] == 0

    def test_what_was_read_and_acknowledged_makes_room_on_disk(self, backend: Backend, run: str) -> None:
        bus = backend.open(memory_mb=1, spool_mb=1)
        consumer = bus.consumer("telemetry", run, "group", "one")
        producer = bus.producer("telemetry", run)
        for _ in range(4):
            for number in range(38):
                data = np.full((1, 12_500), number, np.float32).tobytes()
                producer.publish(Telemetry(site="a", ticks=[number], seeds=12_500, columns=["x"], data=data))
            assert producer.flush(60)
            messages = [delivery.message for delivery in read_all(consumer, 38)]
            last = [np.frombuffer(message.data, np.float32)[-1] for message in messages if isinstance(message, Telemetry)]
            assert last == list(range(38))
            counts = bus.counts()
            assert counts["dropped"] == counts["gaps"] == counts["spool_bytes"] == 0

    def test_telemetry_comes_out_as_it_went_in(self, backend: Backend, run: str, codec: str) -> None:
        bus = backend.open(codec=codec) if codec else backend.open()
        rows = np.random.default_rng(0).normal(size=(4, 50, 12)).astype(np.float32)
        rows[0, 0, :3] = (np.nan, np.inf, -0.0)
        sent = Telemetry(site="a", ticks=[0, 1, 2, 3], seeds=50, columns=list("abcdefghijkl"), data=rows.tobytes())
        producer = bus.producer("telemetry", run)
        producer.publish(sent)
        assert producer.flush(60)
        (delivery,) = read_all(bus.consumer("telemetry", run, "group", "one"), 1)
        assert delivery.message == sent
