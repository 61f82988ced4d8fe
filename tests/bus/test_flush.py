"""Telemetry leaves when its first row is old enough, on every bus."""

from __future__ import annotations

import time

import torch

from esper.bus import open_bus
from esper.bus.config import MemoryConfig, RedisConfig
from esper.bus.port import BusPort
from esper.bus.server.bus import ServerBus


def test_rows_that_nobody_decides_on_are_sent_when_they_are_old_enough_in_memory_too(tmp_path):
    bus = open_bus(MemoryConfig(flush_s=0.2), tmp_path)
    consumer = bus.consumer("telemetry", "run", "tracker", "one")
    port = BusPort(bus, "run", ("a", "b", "c"))
    port.started(0, 9, [])
    port.telemetry(1, "fc", torch.zeros(2, 3))
    port.end_tick(1)
    assert consumer.read() == []
    time.sleep(0.2)
    port.end_tick(2)
    assert [delivery.message.ticks for delivery in consumer.read()] == [[1]]
    bus.close()


def test_an_idle_writer_looks_as_often_as_telemetry_may_wait(server, tmp_path):
    bus = ServerBus(RedisConfig(flush_s=0.01), server.address, tmp_path / "bus")
    looks = []
    bus.writer.each_round(lambda: looks.append(time.monotonic()))
    time.sleep(0.6)
    bus.close()
    assert len(looks) >= 10
