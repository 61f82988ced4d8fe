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
from faults import FaultProxy, FragileServer, wait_until

from esper.bus.config import RedisConfig
from esper.bus.messages import Metrics, Telemetry, TickEnded
from esper.bus.protocol import Fenced
from esper.bus.server.bus import ServerBus
from esper.bus.spool import Spool

QUICK = {"timeout_s": 0.3, "retry_s": 0.1, "claim_s": 0.5, "deliveries": 5}


@pytest.fixture
def fragile(tmp_path):
    running = FragileServer(tmp_path / "server")
    yield running
    running.process.kill()
    running.process.wait()


@pytest.fixture
def proxy(fragile):
    opened = FaultProxy(fragile.address)
    yield opened
    opened.close()


@pytest.fixture
def open_bus(tmp_path):
    opened = []

    def open_one(address, folder="bus", **settings):
        opened.append(ServerBus(RedisConfig(**QUICK | settings), address, tmp_path / folder))
        return opened[-1]

    yield open_one
    for bus in opened:
        bus.close()


def large(number):
    """A message that goes to the server by itself, as plain commands."""
    return Telemetry(site="a", ticks=[number], seeds=1000, columns=["x"] * 25, data=np.full(25_000, number, "<f4").tobytes())


def drain_large(consumer, wanted, seconds=15.0):
    found, deadline = [], time.monotonic() + seconds
    while len(found) < wanted and time.monotonic() < deadline:
        got = consumer.read(100, 0.05)
        consumer.ack(got)
        found += got
    assert all(delivery.message == large(delivery.message.ticks[0]) for delivery in found)
    return [delivery.message.ticks[0] for delivery in found]


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


def test_whichever_reply_about_a_large_message_is_lost_it_is_stored_once(fragile, proxy, open_bus):
    bus = open_bus(proxy.address, codec="raw")
    producer = bus.producer("telemetry", "run")
    for number in range(40):
        proxy.reset_after_request(spare=number % 8)
        producer.publish(large(number))
        assert producer.flush(10)
    assert bus.counts()["retries"] >= 5
    assert bus.counts()["dropped"] == 0
    reader = open_bus(fragile.address)
    assert drain_large(reader.consumer("telemetry", "run", "group", "one"), 40) == list(range(40))
    assert reader.client.xlen("esper:{run}:telemetry:main") == 40


def test_a_large_message_whose_note_was_lost_before_it_was_read_and_trimmed_is_not_sent_again(fragile, open_bus):
    bus = open_bus(fragile.address, codec="raw")
    producer, consumer = bus.producer("telemetry", "run"), bus.consumer("telemetry", "run", "group", "one")
    producer.publish(large(0))
    assert producer.flush(5)
    assert drain_large(consumer, 1) == [0]
    key, last = "esper:{run}:telemetry:main", "esper:{run}:last:telemetry:main"
    bus.client.delete(last)  # as when the connection broke between the two
    bus.client.xtrim(key, maxlen=0)
    for number in (1, 2):
        producer.publish(large(number))
        assert producer.flush(5)
    assert drain_large(consumer, 2) == [1, 2]
    assert consumer.read(1, 0.1) == []
    assert bus.client.get(last) == b"1-3"
    assert bus.counts()["dropped"] == bus.counts()["gaps"] == 0


def test_a_server_that_lost_large_messages_is_given_them_again_before_the_next(fragile, open_bus):
    bus = open_bus(fragile.address, codec="raw")
    producer, consumer = bus.producer("telemetry", "run"), bus.consumer("telemetry", "run", "group", "one")
    for number in range(20):
        producer.publish(large(number))
    assert producer.flush(5)
    first = drain_large(consumer, 8)
    fragile.restart(cut_bytes=1_000_000)
    for number in range(20, 24):
        producer.publish(large(number))
    assert producer.flush(10)
    assert first + drain_large(consumer, 24 - len(first)) == list(range(24))
    assert bus.counts()["gaps"] == bus.counts()["dropped"] == 0


def test_large_messages_are_added_without_a_script_and_so_keep_others_waiting_less(fragile, open_bus):
    bus = open_bus(fragile.address, codec="raw")
    producer = bus.producer("telemetry", "run")
    bus.client.config_resetstat()
    for number in range(10):
        producer.publish(large(number))
    assert producer.flush(5)
    calls = {name: found["calls"] for name, found in bus.client.info("commandstats").items()}
    assert calls["cmdstat_exec"] == calls["cmdstat_xadd"] == 10


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


def test_a_record_cut_off_by_a_kill_does_not_spoil_those_before_it(tmp_path):
    spool = Spool(tmp_path / "spool", 1 << 20)
    for number in range(10):
        spool.append(1, number + 1, b"x" * 100)
    spool.close()
    (path,) = (tmp_path / "spool").glob("*.spool")
    os.truncate(path, path.stat().st_size - 7)
    again = Spool(tmp_path / "spool", 1 << 20)
    assert [sequence for _, sequence, _ in again.read(100, 1 << 20)] == list(range(1, 10))


@pytest.mark.parametrize("say", [lambda number: TickEnded(tick=number), large], ids=["small", "large"])
def test_a_zombie_that_slept_through_its_replacement_is_fenced(fragile, proxy, open_bus, say):
    zombie = open_bus(proxy.address, codec="raw")
    old = zombie.producer("events", "run")
    old.publish(say(0))
    assert old.flush(5)
    new = open_bus(fragile.address, folder="other", codec="raw").producer("events", "run")
    for number in range(1, 5):
        old.publish(say(100 + number))
    assert wait_until(lambda: any(code == "bus_fenced" for code, _ in zombie.incidents))
    new.publish(say(1))
    assert new.flush(5)
    consumer = open_bus(fragile.address, folder="reader").consumer("events", "run", "group", "one")
    found = consumer.read(10, 1) + consumer.read(10, 0.5)
    assert [delivery.message for delivery in found] == [say(0), say(1)]


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


def test_a_large_message_goes_by_claim_check_and_its_file_goes_when_all_groups_have_it(fragile, open_bus):
    bus = open_bus(fragile.address)
    readers = [bus.consumer("events", "run", group, "one") for group in ("tracker", "controller")]
    for reader in readers:
        assert reader.read(1, 0.0) == []
    producer = bus.producer("events", "run")
    for reader in readers:
        time.sleep(0.21)
        reader.read(1, 0.01)
    producer.publish(Metrics(tick=1, values={f"metric/{number}": float(number) for number in range(100_000)}))
    assert producer.flush(5)
    payloads = bus.folder / "payloads"
    for reader in readers:
        assert len(list(payloads.iterdir())) == 1
        (delivery,) = reader.read(1, 2)
        assert len(delivery.message.values) == 100_000
        reader.ack([delivery])
    assert list(payloads.iterdir()) == []


def test_a_tampered_payload_is_refused(fragile, open_bus):
    bus = open_bus(fragile.address)
    producer, consumer = bus.producer("events", "run"), bus.consumer("events", "run", "group", "one")
    producer.publish(Metrics(tick=1, values={f"metric/{number}": float(number) for number in range(100_000)}))
    assert producer.flush(5)
    (path,) = (bus.folder / "payloads").iterdir()
    data = bytearray(path.read_bytes())
    data[1000] ^= 1
    path.write_bytes(data)
    assert consumer.read(1, 1) == []
    (letter,) = bus.dead_letters("run")
    assert "does not have its hash" in letter.reason


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


@pytest.mark.parametrize("say", [lambda number: TickEnded(tick=number), large], ids=["small", "large"])
def test_an_intruder_who_writes_under_a_producers_ids_is_noticed(fragile, open_bus, say):
    bus = open_bus(fragile.address, codec="raw")
    producer = bus.producer("events", "run")
    producer.publish(say(0))
    assert producer.flush(5)
    bus.client.xadd("esper:{run}:events:main", {"m": b"mine"}, id="1-2")
    producer.publish(say(1))
    assert wait_until(lambda: any(code == "bus_fenced" for code, _ in bus.incidents))
    with pytest.raises(Fenced, match="another process writes to the bus"):
        producer.publish(TickEnded(tick=2))


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
