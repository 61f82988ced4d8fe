"""The thread that carries a run's messages from the bus to its trackers."""

from __future__ import annotations

import functools
import logging
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from esper.bus.protocol import Bus, Delivery
from esper.errors import UserError
from esper.messages import Message, RunEnded
from esper.tracking.run_info import RunInfo
from esper.tracking.tracker import STATUSES, Tracker, TrackerError

if TYPE_CHECKING:
    from torch import Tensor, nn

log = logging.getLogger("esper.tracking")

STREAMS = ("events", "telemetry")
BATCH = 1000
COST = "tracking took %.3f s of the training process's processor time while the run went on"
MAX_AHEAD = 10_000  # beyond this many out-of-order numbers the missing one is taken as lost for good
GRACE_S = 1.0  # how long close() waits for a RunEnded, unless told


class TrackerRunner:
    """Reads events and telemetry of one run and hands them to every tracker, until the run has ended.

    The thread polls instead of waking at every message, so that a trainer publishing thousands a second is left alone.
    Messages are acknowledged after the trackers have flushed them, well before the bus would deliver them again.
    A tracker that raises is dropped, which the log says once and ``close`` raises; the others go on. ``cpu_s`` is the
    processor time that all this took up to the end of the run, in seconds: the most it can have kept from the trainer.
    """

    def __init__(
        self,
        bus: Bus,
        info: RunInfo,
        trackers: Sequence[Tracker],
        *,
        group: str = "tracker",
        poll_s: float = 0.2,
        flush_s: float = 2.0,
    ) -> None:
        self.info = info
        self.errors: list[TrackerError] = []
        self._alive = list(trackers)
        self._consumers = {stream: bus.consumer(stream, info.run, group, "tracker") for stream in STREAMS}
        self._held: dict[str, list[Delivery]] = {stream: [] for stream in STREAMS}
        self._poll_s, self._flush_s = poll_s, flush_s
        self._seen = SeenMessages()
        self._ended: RunEnded | None = None
        self.cpu_s = 0.0
        self._opened, self._idle = threading.Event(), threading.Event()
        self._settling, self._settled = threading.Event(), threading.Event()
        self._status: str | None = None
        self._grace_s = GRACE_S
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name="esper-tracker", daemon=True)

    def start(self) -> None:
        """Start the thread; returns at once."""
        self._thread.start()

    def await_open(self) -> None:
        """After ``start``: wait until every tracker is open, so that no run is trained that a tracker cannot record.

        Raises:
            UserError: one does not, with the remedy.
        """
        self._opened.wait()
        if self.errors:
            cause = self.errors[0].__cause__
            raise cause if isinstance(cause, UserError) else UserError(f"{self.errors[0]}; mend that, or choose tracking=none.")

    @property
    def error(self) -> TrackerError | None:
        """The first error, or None."""
        return self.errors[0] if self.errors else None

    def drain(self, timeout_s: float = 30.0) -> bool:
        """Wait until everything published so far is handled; returns whether it was within ``timeout_s`` seconds."""
        self._idle.clear()
        return self._idle.wait(timeout_s)

    def settle(self, timeout_s: float = 30.0) -> bool:
        """Wait until every tracker has stored everything published so far, and return whether it has; checkpoints wait for it."""
        self._settled.clear()
        self._settling.set()
        return self._settled.wait(timeout_s) and not self.errors

    def try_model(self, model: nn.Module, sample: Tensor) -> None:
        """Export the present model as ``log_model`` would the final one, and throw the result away.

        Raises:
            UserError: a model that torch.export cannot trace.
        """
        from esper.tracking.final_model import write_model

        if any(tracker.wants_model for tracker in self._alive):
            with tempfile.TemporaryDirectory(prefix="esper-") as place:
                try:
                    write_model(model, sample, place)
                except TrackerError as error:
                    raise UserError(f"{error}.") from error

    def log_model(self, model: nn.Module, sample: Tensor) -> None:
        """Give the final model and a sample batch to the trackers that want them; called before ``close``.

        If torch.export cannot trace the model, the log says so and ``close`` raises.
        """
        from esper.tracking.final_model import write_model

        if any(tracker.wants_model for tracker in self._alive):
            try:
                write_model(model, sample, self.info.folder)
            except (TrackerError, OSError) as error:
                self._fail("storing the final model", error)

    def close(self, status: str, timeout_s: float = 150.0, grace_s: float = GRACE_S) -> None:
        """Handle the remaining messages, end the trackers with ``status`` and stop; raises TrackerError if any of them failed.

        Call it after everything was published; ``grace_s`` is how long to wait for a RunEnded that may still be on its
        way, 0 where none is. Closing twice is harmless.
        """
        assert status in STATUSES, status
        self._status = self._status or status
        self._grace_s = grace_s
        self._closing.set()
        if self._thread.ident is None:  # it never began, so its places on the bus must be given back here
            for consumer in self._consumers.values():
                consumer.close()
        elif self._thread.is_alive():
            self._thread.join(timeout_s)
            if self._thread.is_alive():
                raise TrackerError(f"the trackers did not finish within {timeout_s:.0f} s; the run's folder may lack files")
        if len(self.errors) == 1:
            raise self.errors[0]
        if self.errors:
            raise TrackerError("; ".join(map(str, self.errors))) from self.errors[0]

    # --- in the thread ---------------------------------------------------------------------------------------------

    def _work(self) -> None:
        try:
            self._open()
            self._opened.set()
            self._listen()
            self.cpu_s = time.thread_time()
            log.info(COST, self.cpu_s)
            summary = self._ended.summary if self._ended else {}
            self._each(lambda tracker: tracker.close(self._status or "FAILED", summary))
        except Exception as error:  # the bus itself: nothing more can be read, close() raises it
            self._fail("the tracker's connection to the bus", error)
        finally:
            self._opened.set()
            self._idle.set()
            self._settled.set()
            for consumer in self._consumers.values():
                consumer.close()

    def _open(self) -> None:
        """Open all trackers, or leave those closed that come after one that cannot work: none of them begins a run that is refused."""
        opened: list[Tracker] = []
        tried = [self._works(tracker, getattr(tracker, "try_out", lambda: None)) for tracker in self._alive]
        for tracker in self._alive if all(tried) else ():
            if not self._works(tracker, functools.partial(tracker.open, self.info)):
                break
            opened.append(tracker)
        self._alive = opened

    def _listen(self) -> None:
        """Read until close() was called and the streams are empty."""
        heard = flushed = time.monotonic()
        while True:
            closing, settling = self._closing.is_set(), self._settling.is_set()
            found = self._read()
            now = time.monotonic()
            heard = now if found or not closing else heard
            if now - flushed >= self._flush_s or sum(map(len, self._held.values())) >= 20 * BATCH:
                self._flush()
                flushed = now
            if settling and found < BATCH:  # everything published before the request has been read
                self._flush()
                self._settling.clear()
                self._settled.set()
            if not found:
                self._idle.set()
                if closing and (self._ended or now - heard >= self._grace_s):
                    return self._flush()
            if found < BATCH and not closing:
                self._closing.wait(self._poll_s)
            elif not found:
                time.sleep(0.01)

    def _read(self) -> int:
        """Pass one batch of each stream to the trackers; returns the number of messages."""
        messages: list[Message] = []
        found = 0
        for stream, consumer in self._consumers.items():
            deliveries = consumer.read(BATCH)
            found += len(deliveries)
            self._held[stream] += deliveries
            messages += [item.message for item in deliveries if self._seen.is_new(stream, item.producer, item.id)]
        for message in messages:
            if isinstance(message, RunEnded):
                self._ended = message
        if messages:
            self._each(lambda tracker: tracker.record(messages))
        return found

    def _flush(self) -> None:
        self._each(lambda tracker: tracker.flush())
        for stream, consumer in self._consumers.items():
            consumer.ack(self._held[stream])
            self._held[stream] = []

    def _each(self, call: Callable[[Tracker], None]) -> None:
        for tracker in list(self._alive):
            if not self._works(tracker, functools.partial(call, tracker)):
                self._alive.remove(tracker)

    def _works(self, tracker: Tracker, act: Callable[[], None]) -> bool:
        try:
            act()
        except Exception as error:  # training goes on, and close() raises it
            self._fail(getattr(tracker, "called", type(tracker).__name__), error)
            return False
        return True

    def _fail(self, what: str, error: Exception) -> None:
        reason = str(error).strip() or type(error).__name__
        text = f"{what} failed and keeps nothing more: {reason.splitlines()[0]}"
        log.error(text, exc_info=None if isinstance(error, UserError) else error)
        failure = TrackerError(text)
        failure.__cause__ = error
        self.errors.append(failure)


class SeenMessages:
    """Tells which stream entries were handled before, since a bus may hand one out twice; constant memory for numbers without holes."""

    def __init__(self) -> None:
        self._upto: dict[tuple[str, str, int], int] = {}
        self._ahead: dict[tuple[str, str, int], set[int]] = {}

    def is_new(self, stream: str, producer: str, entry: str) -> bool:
        """Whether entry ``<epoch>-<sequence>`` of this stream and producer comes for the first time; remembers it."""
        epoch, sequence = map(int, entry.split("-"))
        key = (stream, producer, epoch)
        upto, ahead = self._upto.get(key, 0), self._ahead.setdefault(key, set())
        if sequence <= upto or sequence in ahead:
            return False
        ahead.add(sequence)
        if len(ahead) > MAX_AHEAD:
            upto = min(ahead) - 1
        while upto + 1 in ahead:
            upto += 1
            ahead.remove(upto)
        self._upto[key] = upto
        return True
