"""Shared by the tests of the bus."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from esper.bus import open_bus as opened_as
from esper.bus.config import MemoryConfig, RedisConfig
from esper.bus.protocol import Bus
from esper.bus.server.bus import ServerBus
from esper.bus.server.embedded import EmbeddedServer

sys.path.insert(0, str(Path(__file__).parent))  # samples.py, faults.py, deciding.py

from faults import FaultProxy, FragileServer

QUICK = {"timeout_s": 0.3, "retry_s": 0.1, "claim_s": 0.5, "deliveries": 5}


@pytest.fixture(scope="session")
def server(processes: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServer]:
    """One real Valkey server for the tests that do not hurt it."""
    running = EmbeddedServer(tmp_path_factory.mktemp("valkey"))
    yield running
    running.stop()


@pytest.fixture
def fragile(processes: None, tmp_path: Path) -> Iterator[FragileServer]:
    """A real server of the test's own, for bad things to happen to."""
    running = FragileServer(tmp_path / "server")
    yield running
    running.process.kill()
    running.process.wait()


@pytest.fixture
def proxy(fragile: FragileServer) -> Iterator[FaultProxy]:
    """A way to ``fragile`` that breaks when it is told to."""
    opened = FaultProxy(fragile.address)
    yield opened
    opened.close()


@pytest.fixture
def open_bus(tmp_path: Path) -> Iterator[Callable[..., ServerBus]]:
    """Opens buses at an address, each as a process of its own would; short times."""
    opened = []

    def open_one(address, folder="bus", **settings):
        opened.append(ServerBus(RedisConfig(**QUICK | settings), address, tmp_path / folder))
        return opened[-1]

    yield open_one
    for bus in opened:
        bus.close()


@pytest.fixture
def bus(tmp_path: Path) -> Iterator[Bus]:
    """A bus in this process's memory."""
    opened = opened_as(MemoryConfig(), tmp_path)
    yield opened
    opened.close()


@pytest.fixture
def served(server: EmbeddedServer, tmp_path: Path) -> Iterator[ServerBus]:
    """A bus on the shared server; patient, because while it waits in vain for a busy machine it reads nothing."""
    opened = ServerBus(RedisConfig(timeout_s=5.0), server.address, tmp_path / "bus")
    yield opened
    opened.close()
