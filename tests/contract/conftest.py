"""Every backend there is; the suite beside this file runs over each of them."""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from esper.bus.aio import AsyncBus, AsyncConsumer, AsyncProducer
from esper.bus.config import EmbeddedConfig, MemoryConfig, RedisConfig
from esper.bus.memory.bus import MemoryBus
from esper.bus.protocol import Bus, Consumer, Delivery
from esper.bus.server.bus import EmbeddedBus, ServerBus
from esper.bus.server.connection import Address
from esper.bus.server.embedded import EmbeddedServer, address_in

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bus"))

from tls import tls_before

QUICK = {"claim_s": 0.3, "deliveries": 3}


@pytest.fixture(scope="session")
def server(processes: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServer]:
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

        def call(*arguments: object, **settings: object) -> object:
            result = value(*arguments, **settings)
            if inspect.isawaitable(result):
                result = self._loop.run_until_complete(result)
            return Blocking(result, self._loop) if isinstance(result, AsyncProducer | AsyncConsumer) else result

        return call


class Backend:
    """Opens buses that see the same streams, as processes of one run do."""

    def __init__(self, name: str, folder: Path, address: Address | None) -> None:
        self.name, self._folder, self._address = name, folder, address
        self._loop = asyncio.new_event_loop()
        self._opened: list[Bus] = []

    def open(self, **settings: object) -> Bus:
        """A bus; in memory there is one process and therefore one bus, and only the first starts an embedded server."""
        if self.name != "memory" or not self._opened:
            self._opened.append(self._open(QUICK | settings))
        return self._opened[-1]

    def _open(self, settings: dict[str, object]) -> Bus:
        if self.name == "memory":
            return MemoryBus(MemoryConfig(**settings), self._folder)
        if self.name == "embedded":
            config = EmbeddedConfig(**settings)
            if not self._opened:
                return EmbeddedBus(config, self._folder)
            return ServerBus(config, address_in(self._folder / "server"), self._folder)
        bus = ServerBus(RedisConfig(**settings), self._address, self._folder)
        return Blocking(AsyncBus(bus), self._loop) if self.name == "asyncio" else bus

    def kill_one_that_holds(self, run: str, count: int) -> float:
        """When a consumer ``dead`` was killed with so many messages in its hands: ``kill -9`` of a process, where there can be one."""
        if self.name == "memory":  # whoever dies there takes the bus along; what is left of a member is that it reads no more
            assert len(self.open().consumer("events", run, "group", "dead").read(count, 1)) == count
            return time.monotonic()
        bus = self._opened[-1]
        address = dataclasses.asdict(bus.address)
        what = {"run": run, "count": count, "folder": str(self._folder), "settings": QUICK, "address": address}
        command = [sys.executable, str(Path(__file__).parent / "victim.py")]
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as victim:
            try:
                victim.stdin.write(json.dumps(what) + "\n")
                victim.stdin.flush()
                assert victim.stdout.readline() == "held\n"
            finally:
                victim.kill()
                died = time.monotonic()
            assert victim.wait() == -signal.SIGKILL
        return died

    def close(self) -> None:
        for bus in reversed(self._opened):
            bus.close()
        self._loop.close()


@pytest.fixture(scope="session")
def tls(server: EmbeddedServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Address]:
    """The same server behind TLS with client certificates."""
    folder = tmp_path_factory.mktemp("tls")
    with tls_before(server.address.port, folder) as port:
        files = {"tls_ca": "authority.crt", "tls_cert": "client.crt", "tls_key": "client.key"}
        paths = {name: str(folder / file) for name, file in files.items()}
        yield dataclasses.replace(server.address, port=port, tls=True, **paths)


@pytest.fixture(params=["memory", *(pytest.param(name, marks=pytest.mark.server) for name in ("embedded", "redis", "tls", "asyncio"))])
def backend(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Backend]:
    address = None
    if request.param == "tls":
        address = request.getfixturevalue("tls")
    elif request.param in ("redis", "asyncio"):
        address = request.getfixturevalue("server").address
    opened = Backend(request.param, tmp_path, address)
    yield opened
    opened.close()


@pytest.fixture
def run(request: pytest.FixtureRequest) -> str:
    """A run name of the test's own, so that tests can share a server."""
    return f"{request.node.name}"


def read_all(consumer: Consumer, wanted: int, seconds: float = 60.0, ack: bool = True) -> list[Delivery]:
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
