"""The bus for asyncio programs: the same contract, every call awaited, the event loop never blocked.

async with AsyncBus.open(config, folder) as bus:
    consumer = await bus.consumer("events", run, "mine", "one")
    async for delivery in consumer:
        ...
        await consumer.ack([delivery])
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from esper.bus import open_bus
from esper.bus.config import MemoryConfig
from esper.bus.protocol import Bus, Consumer, DeadLetter, Delivery, Id, Producer
from esper.messages import Message

T = TypeVar("T")


class AsyncProducer:
    """The only one that writes its numbering of one stream."""

    def __init__(self, producer: Producer) -> None:
        self._producer = producer

    @property
    def epoch(self) -> int:
        """The number of this start."""
        return self._producer.epoch

    def publish(self, message: Message, after: tuple[str, ...] = ()) -> None:
        """Hand a message over; never waits, so there is nothing to await."""
        self._producer.publish(message, after)

    async def flush(self, timeout_s: float) -> bool:
        """Wait until all is stored, at most ``timeout_s`` seconds; whether it is."""
        return await asyncio.to_thread(self._producer.flush, timeout_s)

    async def close(self) -> None:
        """Flush and release."""
        await asyncio.to_thread(self._producer.close)


class AsyncConsumer:
    """A member of a consumer group, with a thread of its own, so that a waiting read delays no other."""

    def __init__(self, consumer: Consumer) -> None:
        self._consumer = consumer
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="esper-bus-consumer")

    async def _call(self, function: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)

    async def read(self, count: int = 100, block_s: float = 0.0) -> list[Delivery]:
        """Up to ``count`` messages, waiting at most ``block_s`` seconds for the first."""
        return await self._call(self._consumer.read, count, block_s)

    async def ack(self, deliveries: list[Delivery]) -> None:
        """Acknowledge after handling."""
        await self._call(self._consumer.ack, deliveries)

    async def keep(self, deliveries: list[Delivery], on: bool = True) -> None:
        """Handling these takes long: while this consumer reads, no other consumer is given them."""
        await self._call(self._consumer.keep, deliveries, on)

    def handled(self) -> dict[str, Id]:
        """By producer, up to where the group had acknowledged all when this member first looked."""
        return self._consumer.handled()

    async def __aiter__(self) -> AsyncIterator[Delivery]:
        while True:
            for delivery in await self.read(100, 1.0):
                yield delivery

    async def close(self) -> None:
        """Release; messages that were not acknowledged stay pending."""
        await self._call(self._consumer.close)
        self._thread.shutdown(wait=False)


class AsyncBus:
    """A Bus whose waiting calls are coroutines."""

    def __init__(self, bus: Bus) -> None:
        self.bus = bus

    @classmethod
    def open(cls, config: MemoryConfig, output_folder: str | Path) -> AsyncBus:
        """The bus a configuration names; raises UserError when it cannot be reached."""
        return cls(open_bus(config, output_folder))

    async def __aenter__(self) -> AsyncBus:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def producer(self, stream: str, run: str, name: str = "main") -> AsyncProducer:
        """The producer ``name`` of a stream, in a new epoch."""
        return AsyncProducer(await asyncio.to_thread(self.bus.producer, stream, run, name))

    async def consumer(self, stream: str, run: str, group: str, name: str) -> AsyncConsumer:
        """Member ``name`` of consumer group ``group``."""
        return AsyncConsumer(await asyncio.to_thread(self.bus.consumer, stream, run, group, name))

    async def dead_letters(self, run: str) -> list[DeadLetter]:
        """The dead letters, oldest first."""
        return await asyncio.to_thread(self.bus.dead_letters, run)

    async def replay(self, run: str, ids: list[str]) -> int:
        """Hand dead letters to their group once more."""
        return await asyncio.to_thread(self.bus.replay, run, ids)

    async def purge(self, run: str, ids: list[str]) -> int:
        """Forget dead letters."""
        return await asyncio.to_thread(self.bus.purge, run, ids)

    def counts(self) -> dict[str, int]:
        """Counters of this process."""
        return self.bus.counts()

    async def close(self) -> None:
        """Release everything."""
        await asyncio.to_thread(self.bus.close)
