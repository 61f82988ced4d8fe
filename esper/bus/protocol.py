"""The contract that every bus backend keeps.

A stream has named producers. Each numbers its own messages ``<epoch>-<sequence>``: the epoch is new with every start of that
producer, the sequence counts from 1 without a hole. Only one process at a time may be a producer.

A backend implements ``Bus``, ``Producer`` and ``Consumer``. One that lives in the training process alone is a ``LocalBus`` and its own
``local``; one that sends messages to another process is a ``RemoteBus``, and has a bus in memory as its ``local``. The suite that every
backend passes is ``esper.bus.conformance``.
"""

from __future__ import annotations

import re
import threading
from collections import deque
from collections.abc import Callable
from typing import Protocol, cast

import msgspec

from esper.bus.config import MemoryConfig
from esper.errors import UserError
from esper.messages import Message

STREAMS = ("telemetry", "events", "commands", "acks", "proposals")
ORDERS = ("none", "stream", "global", "causal")
Id = tuple[int, int]  # epoch and sequence of a stream entry, written ``<epoch>-<sequence>``
LARGEST = (1 << 64) - 1  # either of them
_ID = re.compile(rb"([0-9]{1,20})-([0-9]{1,20})")
COUNTERS = (
    "sent",  # messages stored by the backend
    "received",  # messages handed to consumers, redeliveries included
    "acknowledged",
    "dropped",  # messages given up because memory and spool were full
    "gaps",  # sequence numbers a consumer found missing
    "duplicates",  # messages seen before and not handed out again
    "refused",  # corrupt, malformed, oversized, newer, or of another run
    "dead_letters",
    "retries",  # attempts to reach the server that failed
    "late",  # messages released out of order because the bounded hold ran out
)
"""The counters of a bus: no message is lost, refused or repeated without being counted."""


def parse_id(id: str | bytes) -> Id:
    """``"3-14"`` as ``(3, 14)``."""
    epoch, _, sequence = (id.decode() if isinstance(id, bytes) else id).partition("-")
    return int(epoch), int(sequence)


def read_id(value: object) -> Id | None:
    """An id read from a server, to which others may write; None for other bytes (epoch and sequence have 64 bits each)."""
    found = _ID.fullmatch(value) if isinstance(value, bytes) else None
    id = (int(found[1]), int(found[2])) if found else (LARGEST + 1, 0)
    return id if max(id) <= LARGEST else None


def id_text(id: Id) -> str:
    """``(3, 14)`` as ``"3-14"``."""
    return f"{id[0]}-{id[1]}"


class Counts:
    """Counters shared by the threads of one bus."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values = dict.fromkeys(COUNTERS, 0)

    def add(self, name: str, amount: int = 1) -> None:
        """Add to one of COUNTERS."""
        with self._lock:
            self._values[name] += amount

    def snapshot(self) -> dict[str, int]:
        """All counters at this moment."""
        with self._lock:
            return dict(self._values)


def counts_in_words(counts: dict[str, int]) -> str:
    """``3 sent, 12 received, …``, by COUNTERS."""
    return ", ".join(f"{counts[name]} {name.replace('_', ' ')}" for name in COUNTERS)


class Delivery(msgspec.Struct, frozen=True, gc=False):
    """One message handed to a consumer.

    ``id`` is its stream entry ``<epoch>-<sequence>`` in the numbering of ``producer``; ``deliveries`` is how often the
    bus has handed it out, this time included; ``time`` is the sender's clock and ``after`` its stated predecessors.
    """

    id: str
    message: Message
    deliveries: int = 1
    producer: str = "main"
    time: float = 0.0
    after: tuple[str, ...] = ()


class DeadLetter(msgspec.Struct, frozen=True):
    """A message that was delivered too often or could not be read; ``message`` is None in the latter case."""

    id: str
    stream: str
    producer: str
    origin: str
    group: str
    deliveries: int
    reason: str
    message: Message | None


class Fenced(UserError):
    """A newer start of the same producer took over: this one must stop publishing."""


class Producer(Protocol):
    """The only one that writes its numbering of one stream of one run."""

    epoch: int

    def publish(self, message: Message, after: tuple[str, ...] = ()) -> None:
        """Hand a message over without ever waiting for the network; raises Fenced after a newer start was noticed."""

    def flush(self, timeout_s: float) -> bool:
        """Wait until all that was published is stored, at most ``timeout_s`` seconds; whether it is."""

    def close(self) -> None:
        """Flush and release."""


class Consumer(Protocol):
    """A named member of a consumer group: every message goes to one member, and stays pending until acknowledged."""

    @property
    def answered(self) -> bool:
        """Whether the last read reached the bus; if not, an empty result does not mean that there are no messages."""

    def read(self, count: int = 100, block_s: float = 0.0) -> list[Delivery]:
        """Up to ``count`` messages, waiting at most ``block_s`` seconds for the first.

        First come the messages that this name left unacknowledged in an earlier life, then those of dead members, then new ones.
        """

    def ack(self, deliveries: list[Delivery]) -> None:
        """Acknowledge after handling."""

    def keep(self, deliveries: list[Delivery], on: bool = True) -> None:
        """Handling these takes longer than ``claim_s``: as long as this consumer reads, no consumer is given them, itself included.

        They count as delivered once; a consumer that reads no more loses them to others like any message. With ``on=False`` they
        are messages like any other again.
        """

    def handled(self) -> dict[str, Id]:
        """By producer, up to where the group had acknowledged all when this member joined; complete once a read returned messages."""

    def close(self) -> None:
        """Release; messages that were not acknowledged stay pending for another member to claim."""


class Bus(Protocol):
    """Streams of runs, written by producers and read by consumer groups.

    ``incidents`` collects events of the bus itself, as (code, sentence): the server is gone, is back, refuses.
    """

    incidents: deque[tuple[str, str]]
    counters: Counts

    @property
    def config(self) -> MemoryConfig:
        """Its settings."""

    @property
    def local(self) -> LocalBus:
        """The in-process bus for parts of the training process: the bus itself where there is no server."""

    def producer(self, stream: str, run: str, name: str = "main") -> Producer:
        """The producer ``name`` of ``stream`` (one of STREAMS) of ``run``, in a new epoch."""

    def consumer(self, stream: str, run: str, group: str, name: str) -> Consumer:
        """Member ``name`` of consumer group ``group``, reading ``stream`` of ``run`` from its beginning."""

    def dead_letters(self, run: str) -> list[DeadLetter]:
        """The dead letters, oldest first."""

    def replay(self, run: str, ids: list[str]) -> int:
        """Hand dead letters with these ids to their group once more; how many there were."""

    def purge(self, run: str, ids: list[str]) -> int:
        """Forget dead letters with these ids; how many there were."""

    def counts(self) -> dict[str, int]:
        """The counters of this process by COUNTERS, and ``spool_bytes``."""

    def close(self) -> None:
        """Release everything; servers started by this bus are stopped."""


class LocalBus(Bus, Protocol):
    """A bus inside one process; messages that no group reads are not kept."""

    def has_readers(self, stream: str, run: str) -> bool:
        """Whether any consumer group reads this stream."""


class RemoteProducer(Producer, Protocol):
    """A producer whose messages leave the process."""

    def send(self, message: Message, timeout_s: float) -> bool:
        """Publish and wait until it is stored, at most ``timeout_s`` seconds; whether it is."""

    def barrier(self, timeout_s: float) -> bool:
        """Make everything published survive this process; whether the other side has it after ``timeout_s`` seconds."""


class RemoteBus(Bus, Protocol):
    """A bus whose messages leave the process, sent by its own thread so that no training step waits."""

    @property
    def reachable(self) -> bool:
        """Whether the other side answers, as far as is known without asking it."""

    def producer(self, stream: str, run: str, name: str = "main") -> RemoteProducer:
        """As ``Bus.producer``."""

    def each_round(self, chore: Callable[[], None]) -> None:
        """Call ``chore`` from the thread that sends, several times a second, before anything is sent."""

    def send_now(self) -> None:
        """Send waiting messages from the calling thread."""


def remote(bus: Bus) -> RemoteBus | None:
    """The bus itself where its messages leave the process, None where they do not."""
    return None if bus.local is bus else cast("RemoteBus", bus)
