"""Real server, real kills: nothing lost, nothing twice, order kept, drops counted."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import textwrap
import threading
import time

import numpy as np
import pytest
from faults import wait_until

from esper.bus.messages import Telemetry, TickEnded
from esper.bus.programs.track import fresh_group
from esper.bus.spool import Spool
from esper.errors import UserError


def drain(consumer, wanted, seconds=15.0):
    found, deadline = [], time.monotonic() + seconds
    while len(found) < wanted and time.monotonic() < deadline:
        got = consumer.read(100, 0.05)
        consumer.ack(got)
        found += got
    return [delivery.message.tick for delivery in found]


def test_replies_lost_after_the_request_was_done_make_neither_hole_nor_double(fragile, proxy, open_bus):
    bus = open_bus(proxy.address)
    producer = bus.producer("events", "run")
    for number in range(400):
        if number % 20 == 0:
            proxy.reset_after_request()
        producer.publish(TickEnded(tick=number))
        if number % 10 == 0:
            producer.flush(5)
    assert producer.flush(10)
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
    assert producer.flush(10)
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
    assert producer.flush(5)
    first = drain(consumer, 60)
    fragile.restart(cut_bytes=cut)
    if not quiet:
        for number in range(100, 120):
            producer.publish(TickEnded(tick=number))
        assert producer.flush(10)
    assert first + drain(consumer, total - len(first)) == list(range(total))
    assert bus.counts()["gaps"] == bus.counts()["dropped"] == 0


def test_a_frozen_server_never_makes_publishing_wait_and_nothing_is_lost(fragile, open_bus):
    bus = open_bus(fragile.address, memory_mb=1)
    producer = bus.producer("telemetry", "run")
    rows = np.random.default_rng(0).random((1, 1000, 12), dtype=np.float32).tobytes()
    columns = list("abcdefghijkl")
    fragile.freeze()
    took = []
    for number in range(300):
        started = time.perf_counter()
        producer.publish(Telemetry(site="a", ticks=[number], seeds=1000, columns=columns, data=rows))
        took.append(time.perf_counter() - started)
        time.sleep(0.002)
    assert bus.counts()["spool_bytes"] > 0
    assert np.median(took) < 0.001
    fragile.thaw()
    assert producer.flush(20)
    assert bus.counts()["spool_bytes"] == bus.counts()["dropped"] == 0
    consumer = bus.consumer("telemetry", "run", "group", "one")
    found = []
    while len(found) < 300:
        got = consumer.read(50, 1)
        assert got
        consumer.ack(got)
        found += [delivery.message.ticks[0] for delivery in got]
    assert found == list(range(300))


@pytest.mark.parametrize("drop", ["newest", "oldest"])
def test_only_a_full_spool_drops_and_every_drop_is_counted_and_seen_as_a_gap(fragile, open_bus, drop):
    bus = open_bus(fragile.address, memory_mb=1, spool_mb=1, drop=drop, codec="raw")
    producer, consumer = bus.producer("telemetry", "run"), bus.consumer("telemetry", "run", "group", "one")

    def say(number):
        producer.publish(Telemetry(site="a", ticks=[number], seeds=100, columns=["x"] * 100, data=bytes(40_000)))

    say(0)
    assert producer.flush(5)
    fragile.kill()
    for number in range(1, 150):
        say(number)
    fragile.start()
    assert producer.flush(20)
    say(150)
    assert producer.flush(5)
    found = []
    while not found or found[-1] != 150:
        got = consumer.read(50, 1)
        consumer.ack(got)
        found += [delivery.message.ticks[0] for delivery in got]
    assert found == sorted(set(found))
    counts = bus.counts()
    assert counts["dropped"] == counts["gaps"] == 151 - len(found) > 0


def test_what_a_killed_process_left_on_disk_is_sent_by_the_next_start(fragile, open_bus, tmp_path):
    program = """
        import os, sys, time
        from pathlib import Path
        from esper.bus.config import RedisConfig
        from esper.bus.messages import TickEnded
        from esper.bus.server.bus import ServerBus
        from esper.bus.server.embedded import address_in
        bus = ServerBus(RedisConfig(timeout_s=0.2, retry_s=0.1), address_in(Path(sys.argv[1])), Path(sys.argv[2]))
        producer = bus.producer("events", "run")
        for number in range(50):
            producer.publish(TickEnded(tick=number))
        assert producer.flush(5)
        print("ready", flush=True)
        sys.stdin.readline()
        for number in range(50, 100):
            producer.publish(TickEnded(tick=number))
        assert not producer.barrier(0.2)
        print("on disk", flush=True)
        sys.stdin.readline()
    """
    command = [sys.executable, "-c", textwrap.dedent(program), str(fragile.folder), str(tmp_path / "bus")]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    fragile.kill()
    process.stdin.write("\n")
    process.stdin.flush()
    assert process.stdout.readline() == "on disk\n"
    process.kill()
    process.wait()
    fragile.start()
    bus = open_bus(fragile.address)
    producer = bus.producer("events", "run")
    producer.publish(TickEnded(tick=100))
    assert producer.flush(5)
    assert drain(bus.consumer("events", "run", "group", "one"), 101) == list(range(101))
    assert bus.counts()["gaps"] == 0


def test_broken_connections_do_not_count_as_deliveries_of_what_is_in_hands(fragile, proxy, open_bus):
    bus = open_bus(proxy.address, deliveries=2, claim_s=60)
    producer, consumer = bus.producer("commands", "run"), bus.consumer("commands", "run", "trainer", "trainer")
    producer.publish(TickEnded(tick=7))
    assert producer.flush(5)
    assert [delivery.message.tick for delivery in consumer.read(1, 2)] == [7]
    for _ in range(4):
        proxy.reset_all()
        assert consumer.read(1, 0.2) == []
    (again,) = open_bus(fragile.address, deliveries=2).consumer("commands", "run", "trainer", "trainer").read(1, 2)
    assert (again.message.tick, again.deliveries) == (7, 2)
    assert bus.dead_letters("run") == []


@pytest.mark.parametrize("before", [0, 1])  # deliveries in an earlier life
@pytest.mark.parametrize("spare", [1, 2, 3, 4])  # replies of a read that come through: those of login and joining, of the claim …
def test_broken_connections_do_not_count_as_deliveries_of_what_never_arrived(fragile, proxy, open_bus, spare, before):
    bus = open_bus(fragile.address, deliveries=2)
    producer = bus.producer("events", "run")
    for number in range(3):
        producer.publish(TickEnded(tick=number))
    assert producer.flush(5)
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


def test_a_record_cut_off_by_a_kill_does_not_spoil_those_before_it(tmp_path):
    spool = Spool(tmp_path / "spool", 1 << 20)
    for number in range(10):
        spool.append(1, number + 1, b"x" * 100)
    spool.close()
    (path,) = (tmp_path / "spool").glob("*.spool")
    os.truncate(path, path.stat().st_size - 7)
    again = Spool(tmp_path / "spool", 1 << 20)
    assert [sequence for _, sequence, _ in again.read(100, 1 << 20)] == list(range(1, 10))


def test_poison_is_dead_lettered_at_once_and_stops_nobody(fragile, open_bus):
    bus = open_bus(fragile.address)
    producer, consumer = bus.producer("events", "run"), bus.consumer("events", "run", "group", "one")
    producer.publish(TickEnded(tick=0))
    assert producer.flush(5)
    stranger = bus.producer("events", "other")
    stranger.publish(TickEnded(tick=66))
    assert stranger.flush(5)
    key = "esper:{run}:events:main"
    foreign = bus.client.xrange("esper:{other}:events:main")[0][1]
    bus.client.xadd(key, {"m": b"\x80 no message"}, id="1-2")
    bus.client.xadd(key, foreign, id="1-3")
    bus.client.xadd(key, {"x": b"nothing"}, id="1-4")
    bus.client.xadd("esper:{run}:events:intruder", {"m": b"not announced"})
    assert drain(consumer, 2, seconds=1) == [0]
    letters = bus.dead_letters("run")
    assert [letter.origin for letter in letters] == ["1-2", "1-3", "1-4"]
    assert all(letter.message is None or letter.message == TickEnded(tick=66) for letter in letters)
    assert bus.counts()["refused"] == bus.counts()["dead_letters"] == 3


def test_acknowledged_entries_are_trimmed_and_unacknowledged_ones_never(fragile, open_bus):
    bus = open_bus(fragile.address, keep_mb=1, codec="raw")
    producer, consumer = bus.producer("telemetry", "run"), bus.consumer("telemetry", "run", "group", "one")
    for number in range(60):
        producer.publish(Telemetry(site="a", ticks=[number], seeds=100, columns=["x"] * 100, data=bytes(40_000)))
    assert producer.flush(5)
    got = consumer.read(60, 1)
    consumer.ack(got[:20] + got[30:])
    key = "esper:{run}:telemetry:main"
    assert wait_until(lambda: bus.client.xlen(key) == 40, 6)
    time.sleep(0.6)
    again = consumer.read(60, 1)
    assert [delivery.message.ticks[0] for delivery in again] == list(range(20, 30))


def test_who_reads_from_the_beginning_notices_that_all_of_it_was_trimmed(fragile, open_bus):
    bus = open_bus(fragile.address, keep_mb=1, codec="raw")
    producer, consumer = bus.producer("telemetry", "run"), bus.consumer("telemetry", "run", "controller", "one")
    for number in range(60):
        producer.publish(Telemetry(site="a", ticks=[number], seeds=100, columns=["x"] * 100, data=bytes(40_000)))
    assert producer.flush(5)
    while found := consumer.read(60, 0.5):
        consumer.ack(found)
    assert wait_until(lambda: bus.client.xlen("esper:{run}:telemetry:main") <= 1, 6)
    with pytest.raises(UserError, match="let go of the beginning"):
        fresh_group(bus, "run", ["telemetry"])


def test_a_server_that_forgot_the_epochs_gives_none_twice(fragile, open_bus):
    first = open_bus(fragile.address)
    producer = first.producer("events", "run")
    producer.publish(TickEnded(tick=0))
    assert producer.flush(5)
    fragile.restart(cut_bytes=10_000_000)
    again = open_bus(fragile.address).producer("events", "run")
    assert again.epoch == producer.epoch + 1


def test_a_full_disk_costs_what_did_not_fit_and_nothing_before_it(tmp_path):
    spool = Spool(tmp_path / "spool", 64 << 20)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        dropped = [spool.append(1, number, bytes(3000)) for number in (1, 2, 3, 4)]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert dropped == [0, 0, 0, 1]
    assert spool.append(1, 5, b"after") == 0
    assert [sequence for _, sequence, _ in spool.read(10, 1 << 20)] == [1, 2, 3, 5]


def test_a_server_out_of_memory_makes_messages_wait_with_an_alert_and_loses_none(fragile, open_bus):
    bus = open_bus(fragile.address, codec="raw")
    producer, consumer = bus.producer("telemetry", "run"), bus.consumer("telemetry", "run", "group", "one")
    with bus.client as client:
        client.config_set("maxmemory", "3mb")
        for number in range(100):
            producer.publish(Telemetry(site="a", ticks=[number], seeds=100, columns=["x"] * 100, data=bytes(40_000)))
        assert not producer.flush(1)
        assert wait_until(lambda: any(code == "bus_refused" for code, _ in bus.incidents))
        client.config_set("maxmemory", "0")
    assert producer.flush(10)
    found = []
    while len(found) < 100:
        got = consumer.read(50, 1)
        assert got
        consumer.ack(got)
        found += [delivery.message.ticks[0] for delivery in got]
    assert found == list(range(100))


def test_sending_at_once_waits_for_none_of_the_writers_chores(fragile, open_bus):
    bus = open_bus(fragile.address)
    producer = bus.producer("events", "run")
    began, go_on, ended, threads = threading.Event(), threading.Event(), [], set()

    def chore():
        began.set()
        ended.append(go_on.wait(10))

    bus.writer.each_round(lambda: threads.add(threading.current_thread().name))
    bus.writer.after_round(chore)
    assert began.wait(5)
    assert producer.send(TickEnded(tick=1), 5)
    assert ended == []
    go_on.set()
    assert threads == {"esper-bus-writer"}
