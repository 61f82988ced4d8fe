"""The one thread that sends: it alone waits for the server, and a server that is gone opens a circuit breaker."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

from esper.bus.config import ServerConfig
from esper.bus.protocol import Counts, Id, id_text, parse_id
from esper.bus.server import keys
from esper.bus.server.connection import Client
from esper.bus.server.outbox import LARGE, Outbox, StreamPositions

log = logging.getLogger(__name__)

LINGER_S = 0.02  # telemetry and events wait this long for company; commands and acknowledgements do not
IDLE_S = 0.25  # how long the thread sleeps at most where nobody wakes it; no longer than telemetry may wait
CHECK_S = 1.0  # a quiet producer looks this often whether the server still has its messages
REFUSED_BY_SERVER_S = 0.2  # pause after the server refused an entry (out of memory, read-only replica, loading)
Incident = Callable[[str, str], None]  # code, sentence
Answer = tuple[bytes, bytes, bytes]  # stored, stopped, fenced or elsewhere; last id (of fenced: the newer epoch); error


class Sender:
    """Sends the messages of the outboxes in order, each batch by one atomic script that stops at its first refusal.

    A batch that is one large entry goes as a transaction of plain commands, under the same conditions: carrying it into a
    script and out again keeps the server from everybody else for several times as long.
    """

    def __init__(self, client: Client, config: ServerConfig, counts: Counts, incident: Incident) -> None:
        import pybreaker
        import redis

        self._client, self._config, self._counts, self._incident = client, config, counts, incident
        self._append = client.register_script(keys.APPEND)
        self._note = client.register_script(keys.NOTE)
        self._positions = StreamPositions(client)
        self._outboxes: list[tuple[Outbox, str]] = []
        self._before: list[Callable[[], None]] = []
        self._after: list[Callable[[], None]] = []
        self._wake = threading.Event()
        self._urgent = threading.Event()
        self._stopping = False
        self._sending = threading.Lock()
        self._listener = _Listener(incident)
        listener: Any = self._listener  # no subclass of pybreaker's, which is imported late
        self._breaker = pybreaker.CircuitBreaker(
            fail_max=3,
            reset_timeout=config.retry_s,
            exclude=[redis.ResponseError],
            listeners=[listener],
            name="bus",
        )
        self._thread = threading.Thread(target=self._run, name="esper-bus-sender", daemon=True)
        self._thread.start()

    def add(self, outbox: Outbox, stream: str) -> None:
        """Send the messages of this outbox to ``stream``."""
        self._outboxes.append((outbox, stream))

    def remove(self, outbox: Outbox) -> None:
        """Forget an outbox."""
        self._outboxes = [pair for pair in self._outboxes if pair[0] is not outbox]

    def each_round(self, chore: Callable[[], None]) -> None:
        """Call ``chore`` from the sender thread, several times a second, before anything is sent."""
        self._before.append(chore)

    def after_round(self, chore: Callable[[], None]) -> None:
        """Call ``chore`` from the sender thread, several times a second, after all sending, so that no message waits for it."""
        self._after.append(chore)

    def wake(self, urgent: bool) -> None:
        """There is something to send; ``urgent`` does not wait for company."""
        if urgent:
            self._urgent.set()
        if not self._wake.is_set():
            self._wake.set()

    @property
    def open(self) -> bool:
        """Whether the server counts as gone: from repeated failures until one attempt succeeds."""
        return self._listener.down

    def stop(self) -> None:
        """End the thread after the round it is in."""
        self._stopping = True
        self.wake(urgent=True)
        self._thread.join()

    def _run(self) -> None:
        try:
            self._loop()
        except BaseException as error:
            for outbox, _ in self._outboxes:  # its producer raises this at the next publish, in the trainer's thread
                outbox.fenced = f"the bus writer ended with {type(error).__name__}: {error}"
            raise

    def _loop(self) -> None:
        while not self._stopping:
            self._wake.wait(timeout=min(IDLE_S, self._config.flush_s))
            if self._wake.is_set():
                self._urgent.wait(timeout=LINGER_S)
            self._urgent.clear()
            self._wake.clear()
            with self._sending:
                self._round(self._before)
            for chore in self._after:
                chore()

    def send_now(self) -> None:
        """Send waiting messages from the calling thread, without waking the sender thread and without its chores."""
        with self._sending:
            self._round(())

    def _round(self, chores: Iterable[Callable[[], None]]) -> None:
        """Send until nothing is left or the server is in trouble, ``chores`` being done first each time."""
        import pybreaker
        import redis

        busy = True
        while busy and not self._stopping:
            busy = False
            # Messages from before an event must be on the server before it: the events' batch is put together first
            # and sent last, so that a reader who sees TickEnded finds that tick's telemetry.
            for outbox, stream in self._outboxes:
                outbox.spill()
                if stream == "events":
                    outbox.batch()
            for chore in chores:
                chore()
            for outbox, stream in sorted(self._outboxes, key=lambda pair: pair[1] == "events"):
                if outbox.fenced or not (outbox.waiting or self._doubts(outbox)):
                    continue
                try:
                    self._breaker.call(self._send_upto, outbox, stream, outbox.sequence)
                    busy = busy or outbox.waiting > 0
                except pybreaker.CircuitBreakerError:
                    self._pause(min(0.05, self._config.retry_s))
                    self.wake(urgent=True)
                    return
                except redis.ResponseError as error:
                    self._said_no(error)
                    return
                except (redis.ConnectionError, redis.TimeoutError) as error:
                    self._counts.add("retries")
                    outbox.last = None  # the reply is lost, not necessarily the request: ask before sending again
                    log.debug("bus: %s", type(error).__name__)
                    self._pause(0.02)
                    self.wake(urgent=True)
                    return

    def _doubts(self, outbox: Outbox) -> bool:
        """From time to time a quiet outbox asks whether the server still has the messages that it confirmed."""
        if time.monotonic() < outbox.next_check:
            return False
        outbox.last = None
        return True

    def _pause(self, seconds: float) -> None:
        """Wait, but keep making room in memory."""
        for outbox, _ in self._outboxes:
            outbox.spill()
        time.sleep(seconds)

    def _send_upto(self, outbox: Outbox, stream: str, sequence: int) -> None:
        """Everything of an outbox up to ``sequence``; of the events only the batch that was put together."""
        self._send(outbox, stream)
        while stream != "events" and outbox.waiting and outbox.confirmed < (outbox.epoch, sequence) and not outbox.fenced:
            self._send(outbox, stream)

    def _send(self, outbox: Outbox, stream: str) -> None:
        """One batch; raises redis errors."""
        names = [part(outbox.run, stream, outbox.name) for part in (keys.entries, keys.last, keys.epoch)]
        names.append(keys.producers(outbox.run, stream))
        outbox.next_check = time.monotonic() + CHECK_S
        if outbox.last is None:
            self._reconcile(outbox, stream, names[3])
        batch = outbox.batch()
        if not batch:
            return
        large = len(batch[0][1]) >= LARGE  # alone in its batch, then
        status, last, error = (self._add(outbox, names, *batch[0]) if large else None) or self._run_script(outbox, names, batch)
        if status == b"fenced":
            outbox.fenced = (
                f"run {outbox.run!r} was started again elsewhere (start {last.decode()} of its {stream};"
                f" this is start {outbox.epoch}), so this process stops"
            )
            self._incident("bus_fenced", outbox.fenced)
        elif status == b"elsewhere":
            self._reconcile(outbox, stream, names[3])
        else:
            self._settle(outbox, last.decode())
            if status == b"stopped":
                self._refused(outbox, stream, names, error.decode())

    def _run_script(self, outbox: Outbox, names: list[str], batch: list[tuple[Id, bytes]]) -> Answer:
        """A batch by the script; raises redis errors."""
        arguments: list[bytes | str | int] = [outbox.epoch, outbox.last or "0-0"]
        for id, wire in batch:
            arguments += (id_text(id), wire)
        answer: Answer = self._append(keys=names[:3], args=arguments)
        return answer

    def _add(self, outbox: Outbox, names: list[str], id: Id, wire: bytes) -> Answer | None:
        """One large entry by XADD; None, with nothing done, where the server is not as we think. Raises redis errors.

        Nothing is added when epoch or last id change in between (WATCH), so the conditions are those of the script. The note
        of the last id follows: should it get lost, the stream is ahead of its note, and is believed.
        """
        import redis

        before, now = (outbox.last or "0-0").encode(), id_text(id)
        try:
            with self._client.pipeline() as transaction:
                transaction.watch(*names[1:3])
                last, epoch = transaction.mget(*names[1:3])
                if (last or b"0-0", epoch) != (before, str(outbox.epoch).encode()):
                    return None
                transaction.multi()
                transaction.xadd(names[0], {"m": wire}, id=now)
                (answer,) = transaction.execute(raise_on_error=False)
        except redis.WatchError as error:  # a newer start, or the line broke: either way, ask before sending again
            raise redis.ConnectionError(str(error)) from error
        if isinstance(answer, redis.ResponseError):
            return b"stopped", before, str(answer).encode()
        self._note(keys=names[1:3], args=[outbox.epoch, now])
        return b"stored", now.encode(), b""

    def _settle(self, outbox: Outbox, last: str) -> None:
        outbox.last = last
        outbox.confirm(parse_id(last))

    def _refused(self, outbox: Outbox, stream: str, names: list[str], error: str) -> None:
        """The server said no to an entry: nothing after it was sent; say so and try again later."""
        if "equal or smaller" in error or "exhausted" in error:  # the stream is ahead of the note of its last id, which is believed no more
            self._client.set(names[1], "")
            self._reconcile(outbox, stream, names[3])
            return
        self._said_no(error)

    def _said_no(self, error: object) -> None:
        self._incident("bus_refused", f"the bus server refuses messages, which wait meanwhile: {error}")
        self._counts.add("retries")
        self._pause(REFUSED_BY_SERVER_S)
        self.wake(urgent=True)

    def _reconcile(self, outbox: Outbox, stream: str, members: str) -> None:
        """After a lost reply or a restart of the server: read back the last message that it has, and continue from there."""
        import redis

        try:
            self._client.sadd(keys.RUNS, outbox.run)  # a server that came back empty knows neither run nor producer
            self._client.sadd(members, outbox.name)
        except redis.ResponseError as error:  # somebody else has the key: readers may miss the producer, and it goes on
            log.debug("bus: %s", error)
        stands = self._positions.find(outbox, stream)
        if stands is None:
            outbox.fenced = f"another process writes to the bus as {outbox.name!r} of run {outbox.run!r}"
            self._incident("bus_fenced", outbox.fenced)
            return
        if missing := outbox.rewind(stands):
            self._counts.add("dropped", missing)
            self._incident(
                "bus_lost_tail",
                f"the server lost {missing} confirmed messages more than the bus.replay={self._config.replay} kept",
            )
        self._settle(outbox, id_text(stands))


class _Listener:
    """Turns changes of the breaker into incidents (duck-typed: pybreaker is imported where it is used)."""

    def __init__(self, incident: Incident) -> None:
        self._incident = incident
        self.down = False

    def before_call(self, breaker: object, function: object, *args: object, **kwargs: object) -> None:
        """Nothing to do."""

    def failure(self, breaker: object, error: BaseException) -> None:
        """Nothing to do."""

    def success(self, breaker: object) -> None:
        """Nothing to do."""

    def state_change(self, breaker: object, old: object, new: object) -> None:
        """Say that the server is gone, or back."""
        name = getattr(new, "name", "")
        if name == "open" and not self.down:  # not again after every probe that fails
            self.down = True
            self._incident("bus_down", "the bus server does not answer: messages wait in memory, then on disk")
        elif name == "closed" and self.down:
            self.down = False
            self._incident("bus_up", "the bus server answers again: what waited is being sent")
