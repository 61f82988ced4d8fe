"""Orders in which a consumer can have its messages, independent of the order in which they arrive.

Waiting is bounded: ``hold_s`` seconds after its arrival a message is released although a message before it is missing, together with
all messages before it that have come by then. A missing message that still comes is released at once. Both are counted as ``late``, and
the sequence numbers that were passed over as ``gaps``.
"""

from __future__ import annotations

import time
from collections import deque
from typing import Protocol

from esper.bus.protocol import ORDERS, Consumer, Counts, Delivery, Id, parse_id


class Order(Protocol):
    """Takes deliveries as they arrive and releases them in order; ``now`` is monotonic seconds."""

    def begin(self, producer: str, handled: Id) -> None:
        """Before the first delivery of ``producer``: its messages up to ``handled`` were handled before, and are not waited for."""

    def push(self, delivery: Delivery, now: float) -> None:
        """Take a delivery that has arrived."""

    def ready(self, now: float) -> list[Delivery]:
        """The messages that may be handled now."""


class StreamOrder:
    """Every producer's messages in the order of their numbers."""

    def __init__(self, hold_s: float, counts: Counts) -> None:
        self._hold_s, self._counts = hold_s, counts
        self._held: dict[str, dict[Id, tuple[Delivery, float]]] = {}
        self._released: dict[str, Id] = {}

    def begin(self, producer: str, handled: Id) -> None:
        """Start behind the messages that were handled before."""
        self._released.setdefault(producer, handled)

    def push(self, delivery: Delivery, now: float) -> None:
        """Take a delivery that has arrived."""
        self._held.setdefault(delivery.producer, {}).setdefault(parse_id(delivery.id), (delivery, now))

    def ready(self, now: float) -> list[Delivery]:
        """The messages that may be handled now, those of each producer in order."""
        return [delivery for delivery, _ in self.timed(now)]

    def timed(self, now: float) -> list[tuple[Delivery, float]]:
        """The same, with the moments at which they arrived."""
        found = []
        for producer, held in self._held.items():
            overdue = max((id for id, (_, since) in held.items() if since + self._hold_s <= now), default=(0, 0))
            for id in sorted(held):
                if not self._release(producer, id, id <= overdue):
                    break
                found.append(held.pop(id))
        return found

    def _release(self, producer: str, id: Id, expired: bool) -> bool:
        epoch, sequence = self._released.get(producer, (0, 0))
        if id <= (epoch, sequence):  # passed over before, or delivered again
            self._counts.add("late")
            return True
        missing = id[1] - 1 - (sequence if id[0] == epoch else 0)
        if missing > 0 and not expired:
            return False
        if missing > 0:
            self._counts.add("gaps", missing)
        self._released[producer] = id
        return True


class GlobalOrder:
    """All producers' messages merged by the senders' clocks (ties by name and number).

    A message waits until every known producer has sent a later one: that is the watermark. A producer
    that is silent longer than ``hold_s`` is not waited for.
    """

    def __init__(self, hold_s: float, counts: Counts, producers: tuple[str, ...] = ()) -> None:
        self._stream = StreamOrder(hold_s, counts)
        self._hold_s, self._counts = hold_s, counts
        self._queues: dict[str, deque[tuple[Delivery, float]]] = {name: deque() for name in producers}
        self._frontier: dict[str, float] = dict.fromkeys(producers, float("-inf"))
        self._last: tuple[float, str, Id] = (float("-inf"), "", (0, 0))

    def begin(self, producer: str, handled: Id) -> None:
        """Start behind the messages that were handled before."""
        self._stream.begin(producer, handled)

    def push(self, delivery: Delivery, now: float) -> None:
        """Take a delivery that has arrived."""
        self._stream.push(delivery, now)

    def ready(self, now: float) -> list[Delivery]:
        """The messages that may be handled now, in global order."""
        for delivery, arrived in self._stream.timed(now):
            self._queues.setdefault(delivery.producer, deque()).append((delivery, arrived))
            known = self._frontier.get(delivery.producer, float("-inf"))
            self._frontier[delivery.producer] = max(known, delivery.time)
        overdue = sum(since + self._hold_s <= now for queue in self._queues.values() for _, since in queue)
        found = []
        while heads := [queue[0] for queue in self._queues.values() if queue]:
            delivery, since = min(heads, key=lambda head: self._key(head[0]))
            silent = any(not queue and self._frontier[name] <= delivery.time for name, queue in self._queues.items())
            if silent and not overdue:
                break
            overdue -= since + self._hold_s <= now
            self._queues[delivery.producer].popleft()
            if self._key(delivery) < self._last:
                self._counts.add("late")
            self._last = max(self._last, self._key(delivery))
            found.append(delivery)
        return found

    @staticmethod
    def _key(delivery: Delivery) -> tuple[float, str, Id]:
        return delivery.time, delivery.producer, parse_id(delivery.id)


class CausalOrder:
    """Stream order, and no message before those its sender named in ``after`` (``producer/epoch-sequence``).

    A cause that its own stream has passed over was waited for already: its effects do not wait for it again, and count as ``late``.
    """

    def __init__(self, hold_s: float, counts: Counts) -> None:
        self._stream = StreamOrder(hold_s, counts)
        self._hold_s, self._counts = hold_s, counts
        self._queues: dict[str, deque[tuple[Delivery, float]]] = {}
        self._released: dict[str, Id] = {}  # by producer, the highest id so far
        self._passed: dict[str, list[tuple[Id, Id]]] = {}  # by producer, pairs of released ids with nothing released between them

    def begin(self, producer: str, handled: Id) -> None:
        """Start behind the messages that were handled before; as causes they have come."""
        self._stream.begin(producer, handled)
        self._released.setdefault(producer, handled)

    def push(self, delivery: Delivery, now: float) -> None:
        """Take a delivery that has arrived."""
        self._stream.push(delivery, now)

    def ready(self, now: float) -> list[Delivery]:
        """The messages that may be handled now, causes before effects."""
        for timed in self._stream.timed(now):
            self._queues.setdefault(timed[0].producer, deque()).append(timed)
        overdue = {name: sum(since + self._hold_s <= now for _, since in queue) for name, queue in self._queues.items()}
        found = []
        progress = True
        while progress:
            progress = False
            for producer, queue in self._queues.items():
                while queue and self._may_go(queue[0][0], overdue[producer] > 0):
                    delivery, since = queue.popleft()
                    overdue[producer] -= since + self._hold_s <= now
                    self._note(producer, parse_id(delivery.id))
                    found.append(delivery)
                    progress = True
        return found

    def _may_go(self, delivery: Delivery, overdue: bool) -> bool:
        """Whether the message may be released; one released before one of its causes is counted."""
        causes = [(producer, parse_id(id)) for producer, _, id in (name.rpartition("/") for name in delivery.after)]
        awaited = any(id > self._released.get(producer, (0, 0)) for producer, id in causes)
        if awaited and not overdue:
            return False
        if awaited or any(first < id < last for producer, id in causes for first, last in self._passed.get(producer, ())):
            self._counts.add("late")
        return True

    def _note(self, producer: str, id: Id) -> None:
        """A message is released: note which numbers it passes over, or that it was one of those."""
        highest = self._released.get(producer, (0, 0))
        passed = self._passed.setdefault(producer, [])
        if id <= highest:
            parts = [((first, id), (id, last)) if first < id < last else ((first, last),) for first, last in passed]
            self._passed[producer] = [pair for pairs in parts for pair in pairs]
            return
        if id != (highest[0], highest[1] + 1):
            passed.append((highest, id))
        self._released[producer] = id


class OrderedConsumer:
    """A consumer whose reads come in an order; held messages are kept from others, and stay pending, so a crash loses none."""

    def __init__(self, consumer: Consumer, order: Order) -> None:
        self._consumer, self._order = consumer, order
        self._ready: deque[Delivery] = deque()

    @property
    def answered(self) -> bool:
        """Whether the consumer's last read reached the bus."""
        return self._consumer.answered

    def read(self, count: int = 100, block_s: float = 0.0) -> list[Delivery]:
        """Up to ``count`` messages in order, waiting at most ``block_s`` seconds for the first."""
        deadline = time.monotonic() + block_s
        while True:
            left = deadline - time.monotonic()
            arrived = self._consumer.read(count, max(0.0, min(left, 0.05)) if not self._ready else 0.0)
            now = time.monotonic()
            for producer, handled in self._consumer.handled().items() if arrived else ():
                self._order.begin(producer, handled)
            for delivery in arrived:
                self._order.push(delivery, now)
            self._consumer.keep(arrived)  # or a hold longer than the claim time would count as failed deliveries
            self._ready.extend(self._order.ready(now))
            if self._ready or now >= deadline:
                released = [self._ready.popleft() for _ in range(min(count, len(self._ready)))]
                self._consumer.keep(released, on=False)
                return released

    def ack(self, deliveries: list[Delivery]) -> None:
        """Acknowledge after handling."""
        self._consumer.ack(deliveries)

    def keep(self, deliveries: list[Delivery], on: bool = True) -> None:
        """Handling these takes long: while this consumer reads, no other consumer is given them."""
        self._consumer.keep(deliveries, on)

    def handled(self) -> dict[str, Id]:
        """By producer, up to where the consumer's group had acknowledged all."""
        return self._consumer.handled()

    def close(self) -> None:
        """Release; messages that are held stay pending."""
        self._consumer.close()


def in_order(consumer: Consumer, order: str, hold_s: float, counts: Counts, producers: tuple[str, ...] = ()) -> Consumer:
    """``consumer`` read in one of ``none | stream | global | causal`` order, from where its group stands.

    It must be the only member at work in its group, since it would wait for messages that other members were given.
    Global order waits for all ``producers`` from the start; one that is not named counts from its first message on.
    """
    assert order in ORDERS, order
    if order == "none":
        return consumer
    if order == "global":
        return OrderedConsumer(consumer, GlobalOrder(hold_s, counts, producers))
    return OrderedConsumer(consumer, (StreamOrder if order == "stream" else CausalOrder)(hold_s, counts))
