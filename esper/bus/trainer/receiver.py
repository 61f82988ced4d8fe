"""Takes commands off a server in a thread of its own, so that the trainer only looks into a queue."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

from esper.bus.protocol import Consumer, Delivery

BLOCK_S = 0.2
AGAIN_S = 1.0


class Receiver:
    """Reads a consumer until closed; ``taken`` gives what came in, ``wait`` waits for more.

    Whatever the server answers, the trainer goes on: errors become incidents (code, sentence); it tries again.
    """

    def __init__(self, consumer: Consumer, incident: Callable[[str, str], None]) -> None:
        self._consumer, self._incident = consumer, incident
        self._arrived: deque[Delivery] = deque()
        self._done: deque[Delivery] = deque()
        self._something = threading.Event()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="esper-bus-receiver", daemon=True)
        self._thread.start()

    def taken(self) -> list[Delivery]:
        """What has arrived since the last call."""
        self._something.clear()
        return [self._arrived.popleft() for _ in range(len(self._arrived))]

    def wait(self, seconds: float) -> None:
        """Wait until something has arrived, at most ``seconds``."""
        self._something.wait(seconds)

    def done(self, delivery: Delivery) -> None:
        """Have the thread acknowledge a delivery."""
        self._done.append(delivery)

    def close(self) -> None:
        """Stop reading and send the acknowledgements that wait."""
        self._closing.set()
        self._thread.join()
        self._consumer.close()

    def _run(self) -> None:
        while not self._closing.is_set():
            try:
                found = self._consumer.read(1000, BLOCK_S)
                self._consumer.keep(found)  # a command may wait for its tick longer than others would let it
                self._arrived.extend(found)
                if found:
                    self._something.set()
                self._acknowledge()
            except Exception as error:
                self._incident("bus_receiver", f"commands cannot be read, and it is tried again: {error}")
                self._closing.wait(AGAIN_S)
        self._acknowledge()

    def _acknowledge(self) -> None:
        if self._done:
            self._consumer.ack([self._done.popleft() for _ in range(len(self._done))])


class Safekeeping:
    """Commands that have ended, until nothing can undo what came of them; only then does the server forget them.

    A run that is killed goes on from its last checkpoint, which knows nothing of what was applied after it. With ``hold`` a
    command is therefore acknowledged when a checkpoint that was taken after its end is on disk, and at once without it.
    """

    def __init__(self, done: Callable[[Delivery], None]) -> None:
        self.hold = False
        self._done = done
        self._ended: list[Delivery] = []
        self._copied: deque[list[Delivery]] = deque()  # of every checkpoint that is on its way to the disk

    def ended(self, delivery: Delivery) -> None:
        """This command needs no answer any more."""
        if self.hold:
            self._ended.append(delivery)
        else:
            self._done(delivery)

    def copied(self) -> None:
        """A checkpoint's state was taken, with all that ended so far in it."""
        if self.hold:
            self._copied.append(self._ended)
            self._ended = []

    def written(self) -> None:
        """The oldest of those is on disk, or a later one: never one whose state was taken after it."""
        for delivery in self._copied.popleft() if self._copied else ():
            self._done(delivery)

    def release(self) -> None:
        """The run is over and will not go on."""
        for delivery in (*(delivery for batch in self._copied for delivery in batch), *self._ended):
            self._done(delivery)
        self._copied.clear()
        self._ended = []
