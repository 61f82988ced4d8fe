"""Real server, real kills: nothing lost, nothing twice, order kept."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
import redis
from faults import drain, wait_until

from esper.messages import Telemetry, TickEnded


def test_replies_lost_after_the_request_was_done_make_neither_hole_nor_double(fragile, proxy, open_bus):
    bus = open_bus(proxy.address)
    producer = bus.producer("events", "run")
    for number in range(400):
        if number % 20 == 0:
            proxy.reset_after_request()
        producer.publish(TickEnded(tick=number))
        if number % 10 == 0:
            producer.flush(60)
    assert producer.flush(60)
    assert bus.counts()["retries"] >= 10
    reader = open_bus(fragile.address)
    assert drain(reader.consumer("events", "run", "group", "one"), 400) == list(range(400))
    assert reader.client.xlen("esper:{run}:events:main") == 400


def test_a_server_killed_and_started_again_continues_the_stream(fragile, open_bus):
    bus = open_bus(fragile.address)
    producer, consumer = bus.producer("events", "run"), bus.consumer("events", "run", "group", "one")
    seen = []
    for number in range(300):
        producer.publish(TickEnded(tick=number))
        if number in (100, 200):
            seen += drain(consumer, 30, seconds=1)
            fragile.restart()
    assert producer.flush(60)
    assert seen + drain(consumer, 300 - len(seen)) == list(range(300))
    assert bus.counts()["dropped"] == 0
    codes = [code for code, _ in bus.incidents]
    assert codes.count("bus_down") == codes.count("bus_up")


@pytest.mark.parametrize("quiet", [False, True])
@pytest.mark.parametrize("cut", [200, 3000, 10_000_000])
def test_a_server_that_lost_its_tail_is_given_it_again_and_readers_notice_nothing(fragile, open_bus, cut, quiet):
    total = 100 if quiet else 120
    bus = open_bus(fragile.address)
    producer, consumer = bus.producer("events", "run"), bus.consumer("events", "run", "group", "one")
    for number in range(100):
        producer.publish(TickEnded(tick=number))
    assert producer.flush(60)
    first = drain(consumer, 60)
    fragile.restart(cut_bytes=cut)
    if not quiet:
        for number in range(100, 120):
            producer.publish(TickEnded(tick=number))
        assert producer.flush(60)
    assert first + drain(consumer, total - len(first)) == list(range(total))
    assert bus.counts()["gaps"] == bus.counts()["dropped"] == 0


def test_a_frozen_server_never_makes_publishing_wait_and_nothing_is_lost(fragile, open_bus, monkeypatch):
    bus = open_bus(fragile.address, memory_mb=1)
    producer = bus.producer("telemetry", "run")
    rows = np.random.default_rng(0).random((1, 1000, 12), dtype=np.float32).tobytes()
    columns = list("abcdefghijkl")
    fragile.freeze()
    asking, send = set(), redis.connection.AbstractConnection.send_packed_command

    def noted(self, *arguments, **settings):
        asking.add(threading.current_thread())
        return send(self, *arguments, **settings)

    monkeypatch.setattr(redis.connection.AbstractConnection, "send_packed_command", noted)
    for number in range(300):
        producer.publish(Telemetry(site="a", ticks=[number], seeds=1000, columns=columns, data=rows))
        time.sleep(0.002)
    assert wait_until(lambda: bus.counts()["spool_bytes"] > 0, 60)
    assert {thread.name for thread in asking} == {"esper-bus-sender"}  # who publishes asks the server for nothing, and so waits for nothing
    monkeypatch.undo()
    fragile.thaw()
    assert producer.flush(60)
    assert bus.counts()["spool_bytes"] == bus.counts()["dropped"] == 0
    consumer = bus.consumer("telemetry", "run", "group", "one")
    found = []
    while len(found) < 300:
        got = consumer.read(50, 1)
        assert got
        consumer.ack(got)
        found += [delivery.message.ticks[0] for delivery in got]
    assert found == list(range(300))


def test_broken_connections_do_not_count_as_deliveries_of_what_is_in_hands(fragile, proxy, open_bus):
    bus = open_bus(proxy.address, deliveries=2, claim_s=60)
    producer, consumer = bus.producer("commands", "run"), bus.consumer("commands", "run", "trainer", "trainer")
    producer.publish(TickEnded(tick=7))
    assert producer.flush(60)
    assert [delivery.message.tick for delivery in consumer.read(1, 2)] == [7]
    for _ in range(4):
        proxy.reset_all()
        assert consumer.read(1, 0.2) == []
    (again,) = open_bus(fragile.address, deliveries=2).consumer("commands", "run", "trainer", "trainer").read(1, 2)
    assert (again.message.tick, again.deliveries) == (7, 2)
    assert bus.dead_letters("run") == []


def test_poison_is_dead_lettered_at_once_and_stops_nobody(fragile, open_bus):
    bus = open_bus(fragile.address)
    producer, consumer = bus.producer("events", "run"), bus.consumer("events", "run", "group", "one")
    producer.publish(TickEnded(tick=0))
    assert producer.flush(60)
    stranger = bus.producer("events", "other")
    stranger.publish(TickEnded(tick=66))
    assert stranger.flush(60)
    key = "esper:{run}:events:main"
    foreign = bus.client.xrange("esper:{other}:events:main")[0][1]
    bus.client.xadd(key, {"m": b"\x80 no message"}, id="1-2")
    bus.client.xadd(key, foreign, id="1-3")
    bus.client.xadd(key, {"x": b"nothing"}, id="1-4")
    bus.client.xadd("esper:{run}:events:intruder", {"m": b"not announced"})
    assert drain(consumer, 1) == [0]
    assert wait_until(lambda: not consumer.read(10, 0.05) and len(bus.dead_letters("run")) == 3)
    letters = bus.dead_letters("run")
    assert [letter.origin for letter in letters] == ["1-2", "1-3", "1-4"]
    assert all(letter.message is None or letter.message == TickEnded(tick=66) for letter in letters)
    assert bus.counts()["refused"] == bus.counts()["dead_letters"] == 3


def test_a_server_that_forgot_the_epochs_gives_none_twice(fragile, open_bus):
    first = open_bus(fragile.address)
    producer = first.producer("events", "run")
    producer.publish(TickEnded(tick=0))
    assert producer.flush(60)
    fragile.restart(cut_bytes=10_000_000)
    again = open_bus(fragile.address).producer("events", "run")
    assert again.epoch == producer.epoch + 1


def test_sending_at_once_waits_for_none_of_the_writers_chores(fragile, open_bus):
    bus = open_bus(fragile.address)
    producer = bus.producer("events", "run")
    began, go_on, ended, threads = threading.Event(), threading.Event(), [], set()

    def chore():
        began.set()
        ended.append(go_on.wait(10))

    bus.sender.each_round(lambda: threads.add(threading.current_thread().name))
    bus.sender.after_round(chore)
    assert began.wait(5)
    assert producer.send(TickEnded(tick=1), 5)
    assert ended == []
    go_on.set()
    assert threads == {"esper-bus-sender"}


@pytest.mark.parametrize("before", [0, 1])  # deliveries in an earlier life
@pytest.mark.parametrize("spare", [1, 2, 3, 4])  # replies of a read that come through: those of login and joining, of the claim …
def test_broken_connections_do_not_count_as_deliveries_of_what_never_arrived(fragile, proxy, open_bus, spare, before):
    bus = open_bus(fragile.address, deliveries=2)
    producer = bus.producer("events", "run")
    for number in range(3):
        producer.publish(TickEnded(tick=number))
    assert producer.flush(60)
    for _ in range(before):
        assert len(bus.consumer("events", "run", "group", "one").read(3, 2)) == 3
    consumer = open_bus(proxy.address, folder="reader", deliveries=2, claim_s=60).consumer("events", "run", "group", "one")
    found = []
    for _ in range(12):
        proxy.reset_after_request(1, spare)
        found += consumer.read(3)
    proxy.calm()
    while len(found) < 3 and (got := consumer.read(3, 2)):
        found += got
    assert bus.dead_letters("run") == []
    assert [(delivery.message.tick, delivery.deliveries) for delivery in found] == [(n, 1 + before) for n in range(3)]
