"""Every backend of esper, for the suite of ``esper.bus.conformance``."""

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
from pathlib import Path
from typing import Any

from esper.bus.aio import AsyncBus, AsyncConsumer, AsyncProducer
from esper.bus.config import EmbeddedConfig, MemoryConfig, RedisConfig
from esper.bus.conformance import QUICK, Backend
from esper.bus.memory.bus import MemoryBus
from esper.bus.protocol import Bus
from esper.bus.server.bus import ServerBus
from esper.bus.server.connection import Address
from esper.bus.server.embedded import EmbeddedBus, address_in

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bus"))


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


class InMemory(Backend):
    """The bus inside one process."""

    def make(self, settings: dict[str, Any]) -> Bus:
        return MemoryBus(MemoryConfig(**settings), self.folder)


class OnServer(Backend):
    """Every bus has its connections to one server; ``Embedded`` starts that server, others are given its address."""

    def __init__(self, folder: Path, address: Address) -> None:
        super().__init__(folder)
        self.address = address

    def make(self, settings: dict[str, Any]) -> Bus:
        return ServerBus(RedisConfig(**settings), self.address, self.folder)

    def open(self, **settings: Any) -> Bus:
        self.opened.append(self.make(QUICK | settings))
        return self.opened[-1]

    def die_holding(self, run: str, count: int) -> float:
        """``kill -9`` of a process."""
        address = dataclasses.asdict(self.opened[-1].address)
        what = {"run": run, "count": count, "folder": str(self.folder), "settings": QUICK, "address": address}
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


class Embedded(OnServer):
    """The first bus starts the server, as the trainer does, and others join it."""

    def __init__(self, folder: Path) -> None:
        Backend.__init__(self, folder)

    def make(self, settings: dict[str, Any]) -> Bus:
        config = EmbeddedConfig(**settings)
        if not self.opened:
            return EmbeddedBus(config, self.folder)
        return ServerBus(config, address_in(self.folder / "server"), self.folder)


class Awaited(OnServer):
    """The asyncio client, driven from ordinary code."""

    def __init__(self, folder: Path, address: Address) -> None:
        super().__init__(folder, address)
        self.loop = asyncio.new_event_loop()

    def make(self, settings: dict[str, Any]) -> Bus:
        return Blocking(AsyncBus(super().make(settings)), self.loop)

    def close(self) -> None:
        super().close()
        self.loop.close()
