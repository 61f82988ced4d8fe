"""What the in-process bus keeps on disk: full when it holds its limit, and not before."""

from __future__ import annotations

import os
import random
import resource

import torch

from esper.bus.codec import encode_body
from esper.bus.config import MemoryConfig, RedisConfig
from esper.bus.memory.bus import MemoryBus
from esper.bus.memory.log import Entry, Overflow
from esper.bus.server.bus import ServerBus
from esper.bus.trainer.bus_port import BusPort
from esper.messages import Telemetry

LIMIT = 100_000


def entry(number, size):
    message = Telemetry(site="a", ticks=[number], seeds=1, columns=["x"], data=random.Random(number).randbytes(size))
    return Entry(1, number, 0.0, (), message, size)


def test_it_is_full_when_it_holds_its_limit_whatever_was_let_go_in_whichever_order(tmp_path):
    overflow, draw = Overflow(tmp_path, LIMIT), random.Random(0)
    held, refused = {}, 0
    for number in range(2000):
        new = entry(number, draw.randrange(1, 9000))
        message, size = new.message, len(encode_body(new.message))
        fits = sum(bytes for _, _, bytes in held.values()) + size <= LIMIT
        assert overflow.take(new) == fits
        refused += not fits
        if fits:
            held[number] = new, message, size
        if not fits or draw.random() < 0.1:
            for gone in draw.sample(sorted(held), min(len(held), draw.randrange(1, 5))):
                overflow.release(held.pop(gone)[0])
        assert os.fstat(overflow._file.fileno()).st_size <= LIMIT
        kept, message, _ = held[draw.choice(sorted(held))] if held else (None, None, 0)
        assert kept is None or overflow.read(kept.place) == message
    assert refused > 100
    for kept, message, _ in held.values():
        assert overflow.read(kept.place) == message
        overflow.release(kept)
    assert overflow.bytes_held == os.fstat(overflow._file.fileno()).st_size == 0
    overflow.close()


def test_a_full_disk_costs_what_did_not_fit_and_nothing_before_it(tmp_path):
    overflow = Overflow(tmp_path, 64 << 20)
    entries = [entry(number, 3000) for number in range(4)]
    messages = [each.message for each in entries]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        assert [overflow.take(each) for each in entries] == [True, True, True, False]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert overflow.take(entries[3])
    assert [overflow.read(each.place) for each in entries] == messages
    overflow.close()


def test_a_place_on_disk_is_kept_until_every_group_has_acknowledged_and_a_dead_letter_needs_none(tmp_path):
    bus = MemoryBus(MemoryConfig(memory_mb=1, spool_mb=1, claim_s=0.01, deliveries=1), tmp_path)
    quick, slow = (bus.consumer("telemetry", "run", group, "one") for group in ("quick", "slow"))
    producer = bus.producer("telemetry", "run")
    for number in range(30):
        producer.publish(Telemetry(site="a", ticks=[number], seeds=1, columns=["x"], data=bytes(50_000)))
    full = bus.counts()["spool_bytes"]
    assert full > 400_000
    quick.ack(quick.read(100))
    assert bus.counts()["spool_bytes"] == full
    held = slow.read(100)
    assert bus.counts()["spool_bytes"] == full
    slow.ack(held[:25])
    assert 0 < bus.counts()["spool_bytes"] < full
    while len(bus.dead_letters("run")) < 5:
        assert slow.read(100, 0.02) == []
    assert [letter.message.ticks for letter in bus.dead_letters("run")] == [[number] for number in range(25, 30)]
    assert bus.counts()["spool_bytes"] == bus.counts()["dropped"] == 0
    bus.close()


def test_what_a_stalled_reader_in_the_process_loses_is_in_the_ports_counts(server, tmp_path):
    settings = RedisConfig(memory_mb=1, spool_mb=1, codec="raw", flush_ticks=1)
    served = ServerBus(settings, server.address, tmp_path / "bus")
    tracker = served.local.consumer("telemetry", "stalled", "tracker", "one")
    port = BusPort(served, "stalled", ("x",))
    port.started(0, 60, [])
    for tick in range(60):
        port.telemetry(tick, "fc", torch.full((12_500, 1), float(tick)))
        port.barrier()
    assert port.counts()["spool_bytes"] > 500_000
    tracker.ack(found := tracker.read(100))
    port.telemetry(60, "fc", torch.full((12_500, 1), 60.0))
    tracker.ack(last := tracker.read(100))
    counts = port.counts()
    assert counts["dropped"] == counts["gaps"] == 61 - len(found + last) > 0
    port.close()
    served.close()
