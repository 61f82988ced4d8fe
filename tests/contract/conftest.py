"""Every backend there is; the suite beside this file runs over each of them."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from esper.bus.aio import AsyncBus, AsyncConsumer, AsyncProducer
from esper.bus.config import MemoryConfig, RedisConfig
from esper.bus.memory import MemoryBus
from esper.bus.protocol import Bus, Consumer, Delivery
from esper.bus.server.bus import ServerBus
from esper.bus.server.embedded import EmbeddedServer

QUICK = {"claim_s": 0.3, "deliveries": 3}


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServer]:
    """One real Valkey server for the tests that do not hurt it."""
    running = EmbeddedServer(tmp_path_factory.mktemp("valkey"))
    yield running
    running.stop()


class Blocking:
    """The asyncio client driven from ordinary code, so that the same suite runs over it."""

    def __init__(self, target: object, loop: asyncio.AbstractEventLoop) -> None:
        self._target, self._loop = target, loop

    def __getattr__(self, name: str) -> object:
        value = getattr(self._target, name) if hasattr(type(self._target), name) else getattr(self._target.bus, name)
        if not callable(value):
            return value

        def call(*arguments: object) -> object:
            result = value(*arguments)
            if inspect.isawaitable(result):
                result = self._loop.run_until_complete(result)
            return Blocking(result, self._loop) if isinstance(result, AsyncProducer | AsyncConsumer) else result

        return call


class Backend:
    """Opens buses that see the same streams, as processes of one run do."""

    def __init__(self, name: str, folder: Path, server: EmbeddedServer | None) -> None:
        self.name, self._folder, self._server = name, folder, server
        self._loop = asyncio.new_event_loop()
        self._opened: list[Bus] = []

    def open(self, **settings: object) -> Bus:
        """A bus; in memory there is one process and therefore one bus."""
        if self._server is None:
            if not self._opened:
                self._opened.append(MemoryBus(MemoryConfig(**QUICK | settings), self._folder))
            return self._opened[0]
        bus = ServerBus(RedisConfig(**QUICK | settings), self._server.address, self._folder)
        self._opened.append(bus if self.name == "redis" else Blocking(AsyncBus(bus), self._loop))
        return self._opened[-1]

    def close(self) -> None:
        for bus in self._opened:
            bus.close()
        self._loop.close()


@pytest.fixture(params=["memory", "redis", "asyncio"])
def backend(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Backend]:
    running = None if request.param == "memory" else request.getfixturevalue("server")
    opened = Backend(request.param, tmp_path, running)
    yield opened
    opened.close()


@pytest.fixture
def run(request: pytest.FixtureRequest) -> str:
    """A run name of the test's own, so that tests can share a server."""
    return f"{request.node.name}"


def read_all(consumer: Consumer, wanted: int, seconds: float = 5.0, ack: bool = True) -> list[Delivery]:
    """Read until ``wanted`` messages are there or the time is up."""
    found: list[Delivery] = []
    deadline = time.monotonic() + seconds
    while len(found) < wanted and time.monotonic() < deadline:
        got = consumer.read(100, 0.05)
        if ack:
            consumer.ack(got)
        found += got
    return found


@pytest.fixture
def collect() -> Callable[..., list[Delivery]]:
    return read_all
