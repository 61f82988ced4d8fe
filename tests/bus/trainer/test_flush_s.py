"""Telemetry leaves when its first row is old enough, on every bus."""

from __future__ import annotations

import torch
from faults import wait_until

from esper.bus import open_bus
from esper.bus.config import MemoryConfig, RedisConfig
from esper.bus.server.bus import ServerBus
from esper.bus.trainer.bus_port import BusPort


def test_rows_that_nobody_decides_on_are_sent_when_they_are_old_enough_in_memory_too(tmp_path):
    bus = open_bus(MemoryConfig(flush_s=3600.0), tmp_path)
    consumer = bus.consumer("telemetry", "run", "tracker", "one")
    port = BusPort(bus, "run", ("a", "b", "c"))
    port.started(0, 9, [])
    port.telemetry(1, "fc", torch.zeros(2, 3))
    port.end_tick(1)
    assert consumer.read() == []
    bus.config.flush_s = 0.0  # they are as old as that by now
    port.end_tick(2)
    assert [delivery.message.ticks for delivery in consumer.read()] == [[1]]
    bus.close()


def test_an_idle_sender_looks_as_often_as_telemetry_may_wait(server, tmp_path, monkeypatch):
    bus = ServerBus(RedisConfig(flush_s=0.01), server.address, tmp_path / "bus")
    waits, wait = [], bus.sender._wake.wait
    monkeypatch.setattr(bus.sender._wake, "wait", lambda timeout: waits.append(timeout) or wait(timeout))
    assert wait_until(lambda: len(waits) >= 3)
    bus.close()
    assert set(waits) == {0.01}
