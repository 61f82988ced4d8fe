"""Where messages wait and what that takes: only a full spool drops, drops are counted, and what nobody needs any more is trimmed."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import textwrap
import time

import pytest
from faults import drain, wait_until

from esper.bus.programs.tracker import fresh_group
from esper.bus.server.spool import Spool
from esper.errors import UserError
from esper.messages import Telemetry, TickEnded


@pytest.mark.parametrize("drop", ["newest", "oldest"])
def test_only_a_full_spool_drops_and_every_drop_is_counted_and_seen_as_a_gap(fragile, open_bus, drop):
    bus = open_bus(fragile.address, memory_mb=1, spool_mb=1, drop=drop, codec="raw")
    producer, consumer = bus.producer("telemetry", "run"), bus.consumer("telemetry", "run", "group", "one")

    def say(number):
        producer.publish(Telemetry(site="a", ticks=[number], seeds=100, columns=["x"] * 100, data=bytes(40_000)))

    say(0)
    assert producer.flush(60)
    fragile.kill()
    for number in range(1, 150):
        say(number)
    fragile.start()
    assert producer.flush(20)
    say(150)
    assert producer.flush(60)
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
        from esper.messages import TickEnded
        from esper.bus.server.bus import ServerBus
        from esper.bus.server.embedded import address_in
        bus = ServerBus(RedisConfig(timeout_s=0.2, retry_s=0.1), address_in(Path(sys.argv[1])), Path(sys.argv[2]))
        producer = bus.producer("events", "run")
        for number in range(50):
            producer.publish(TickEnded(tick=number))
        assert producer.flush(60)
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
    assert producer.flush(60)
    assert drain(bus.consumer("events", "run", "group", "one"), 101) == list(range(101))
    assert bus.counts()["gaps"] == 0


def test_a_record_cut_off_by_a_kill_does_not_spoil_those_before_it(tmp_path):
    spool = Spool(tmp_path / "spool", 1 << 20)
    for number in range(10):
        spool.append(1, number + 1, b"x" * 100)
    spool.close()
    (path,) = (tmp_path / "spool").glob("*.spool")
    os.truncate(path, path.stat().st_size - 7)
    again = Spool(tmp_path / "spool", 1 << 20)
    assert [sequence for _, sequence, _ in again.read(100, 1 << 20)] == list(range(1, 10))


def test_acknowledged_entries_are_trimmed_and_unacknowledged_ones_never(fragile, open_bus):
    bus = open_bus(fragile.address, keep_mb=1, codec="raw")
    producer, consumer = bus.producer("telemetry", "run"), bus.consumer("telemetry", "run", "group", "one")
    for number in range(60):
        producer.publish(Telemetry(site="a", ticks=[number], seeds=100, columns=["x"] * 100, data=bytes(40_000)))
    assert producer.flush(60)
    got = consumer.read(60, 1)
    consumer.ack(got[:20] + got[30:])
    key = "esper:{run}:telemetry:main"
    assert wait_until(lambda: bus.client.xlen(key) == 40, 6)
    time.sleep(0.6)
    again = consumer.read(60, 1)
    assert [delivery.message.ticks[0] for delivery in again] == list(range(20, 30))


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
    assert producer.flush(60)
    found = []
    while len(found) < 100:
        got = consumer.read(50, 1)
        assert got
        consumer.ack(got)
        found += [delivery.message.ticks[0] for delivery in got]
    assert found == list(range(100))


def test_who_reads_from_the_beginning_notices_that_all_of_it_was_trimmed(fragile, open_bus):
    bus = open_bus(fragile.address, keep_mb=1, codec="raw")
    producer, consumer = bus.producer("telemetry", "run"), bus.consumer("telemetry", "run", "controller", "one")
    for number in range(60):
        producer.publish(Telemetry(site="a", ticks=[number], seeds=100, columns=["x"] * 100, data=bytes(40_000)))
    assert producer.flush(60)
    while found := consumer.read(60, 0.5):
        consumer.ack(found)
    assert wait_until(lambda: bus.client.xlen("esper:{run}:telemetry:main") <= 1, 6)
    with pytest.raises(UserError, match="let go of the beginning"):
        fresh_group(bus, "run", ["telemetry"])
