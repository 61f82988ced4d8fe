"""The trainer's side of the bus: events and telemetry go out, commands come in, and a step never waits for a server."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor

from esper.bus.metrics import OtlpExporter, PrometheusEndpoint, Reading, TrainerState, readings
from esper.bus.protocol import Bus, Producer, RemoteProducer, remote
from esper.bus.trainer.alert_limit import CODE, AlertLimit
from esper.bus.trainer.commands import SECOND_CONTROLLER, CommandIntake
from esper.bus.trainer.telemetry_ring import TelemetryRing
from esper.errors import UserError
from esper.messages import (
    Acknowledgement,
    Alert,
    Checkpoint,
    Command,
    Message,
    RunEnded,
    RunStarted,
    Telemetry,
    TickEnded,
    Transition,
)
from esper.processes import TIMINGS

ALERTS = {"bus_up": "info"}  # level of an incident of the bus; the others are warnings


class ControllerSilent(UserError):
    """An external controller missed its deadline: save a checkpoint and stop, since going on would change the bits."""


class Runner(Protocol):
    """A controller in the training process."""

    def step(self, tick: int) -> None:
        """Decide on all messages up to ``tick``, and send the commands."""

    def serve(self) -> str | None:
        """Decide on every tick that ends until the run does."""

    def complaints(self) -> list[str]:
        """Exceptions of the controller since the last call, as sentences."""


class BackgroundThread:
    """Runs ``work`` in a daemon thread; ``check`` and ``join`` raise the exception that ended it."""

    def __init__(self, work: Callable[[], object], name: str) -> None:
        self._work = work
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._work()
        except Exception as error:
            self._failure = error

    def check(self) -> None:
        """Raise the exception that ended the thread, if there is one."""
        if self._failure is not None:
            raise self._failure

    def join(self) -> None:
        """Wait for the work to end."""
        self._thread.join()
        self.check()


class BusPort:
    """Implements the engine's Port over a bus.

    Parts of the training process that read the bus (an in-process controller or tracker) attach their consumers to
    ``bus.local`` before ``started``; a stream that nothing in the process reads is not kept for it.

    Args:
        bus: from ``open_bus``.
        run: name of the run.
        columns: names of the telemetry columns.
        runner: the in-process controller, None when there is none or it is external.
        timing: ``lockstep`` (the commands of a tick are applied at the next) or ``free`` (applied when it comes).
        external: a controller in another process decides; in lockstep it is waited for at every tick boundary.
        deadline_s: how long, before ControllerSilent is raised.
    """

    def __init__(
        self,
        bus: Bus,
        run: str,
        columns: tuple[str, ...],
        runner: Runner | None = None,
        timing: str = "lockstep",
        external: bool = False,
        deadline_s: float = 60.0,
    ) -> None:
        assert timing in TIMINGS, timing
        assert not (external and runner is not None)
        self.decided = True
        self.bus, self.run, self.runner, self.timing = bus, run, runner, timing
        self.external, self.deadline_s = external, deadline_s
        config = bus.config
        self._ring = TelemetryRing(columns, config.flush_ticks, config.flush_kb << 10, self._telemetry)
        self._out: dict[str, list[Producer]] = {"telemetry": [], "acks": [], "events": []}
        self._remote: list[RemoteProducer] = []
        self._intake = CommandIntake(bus, run, external, self._acknowledge, self._refuse)
        self._inbox, self.safe = self._intake.inbox, self._intake.safe
        self._thread: BackgroundThread | None = None
        self._over = self.finished = False
        self.watched = TrainerState()
        self._inbox.measure = self.watched.finished
        self._exporters: list[PrometheusEndpoint | OtlpExporter] = []
        self._limit = AlertLimit()

    # --- from the trainer ---

    def started(self, tick: int, total_ticks: int, sites: list[dict[str, Any]]) -> None:
        """Open the streams and publish that the run begins (or continues) at ``tick``.

        A run that stopped because its controller was silent waits here for that decision; raises ControllerSilent.
        """
        away = remote(self.bus)
        for stream, producers in self._out.items():
            if self.bus.local.has_readers(stream, self.run):
                producers.append(self.bus.local.producer(stream, self.run))
            if away is not None:
                self._remote.append(away.producer(stream, self.run))
                producers.append(self._remote[-1])
        if away is not None:
            self._intake.open()
            self._ring.deferred = not self._out["telemetry"][:-1]  # nobody in this process reads it at the tick's end
            away.each_round(self._ring.send_full)
            away.each_round(lambda: self._ring.drain(self.bus.config.flush_s))
        if self.external:
            self._inbox.epoch = self._remote[-1].epoch
        if self.runner is not None and self.timing == "free":
            self._thread = BackgroundThread(self.runner.serve, "esper-controller")
        self.watched.started(tick, sites)
        self._export()
        self.emit(RunStarted(tick=tick, total_ticks=total_ticks, sites=sites))
        if self.external and self.timing == "lockstep" and self._inbox.decided < self._inbox.owed[0]:
            self._wait(self._inbox.owed[0])

    def ended(self, tick: int, status: str, summary: dict[str, Any]) -> None:
        """Publish the end of the run, after everything else."""
        self._ring.drain()
        self._incidents(tick, end=True)
        self.emit(RunEnded(tick=tick, status=status, summary=summary))
        self._over, self.finished = True, status == "FINISHED"

    def emit(self, event: Message) -> None:
        """Publish an event.

        A Checkpoint with a ``path`` was written and verified; one with an empty ``path`` is on its way to the disk.
        """
        match event:
            case Transition():
                self.watched.moved(event.seed, event.source, event.target)
            case Checkpoint() if event.path:
                self.safe.written()
        self._publish("events", event)

    def slot(self, site: str, seeds: int) -> Tensor:
        """Where to write the site's next rows: float32 ``[seeds, columns]`` in the ring, holding anything."""
        return self._ring.slot(site, seeds)

    def telemetry(self, tick: int, site: str, rows: Tensor) -> None:
        """Publish rows (float32 ``[seeds, columns]``, CPU): a filled ``slot`` without a copy, others by copying them into the ring."""
        self._ring.put(tick, site, rows)

    # --- to the trainer ---

    def commands(self, tick: int) -> list[Command]:
        """The commands to apply now, emergency stops first."""
        self._intake.receive()
        return self._inbox.due(tick)

    def acknowledge(self, command_id: str, status: str, reason: str, tick: int) -> None:
        """End a command that ``commands`` handed out: applied, refused or expired, exactly once."""
        self._inbox.finish(command_id, status, reason, tick)

    def end_tick(self, tick: int) -> None:
        """Everything about this tick is published: in lockstep the controller decides now, and the trainer waits for it.

        Raises ControllerSilent when an external one does not answer within ``deadline_s`` seconds.
        """
        self.watched.tick = tick
        controlled = self.external or self.runner is not None
        if controlled:
            self._ring.drain()
        elif self.bus.local is self.bus:  # no sender thread looks for rows that have waited long enough
            self._ring.drain(self.bus.config.flush_s)
        self._incidents(tick)
        self.emit(TickEnded(tick=tick, epoch=self._inbox.epoch))
        if self._thread is not None:
            self._thread.check()
        elif self.runner is not None:
            self.runner.step(tick)
        elif self.external and self.timing == "lockstep":
            self._inbox.asked = (tick, self._inbox.epoch)
            self._wait(tick)
        for text in [] if self.runner is None else self.runner.complaints():
            self.emit(Alert(tick=tick, level="error", code="controller_raised", text=text))

    def _wait(self, tick: int) -> None:
        if (away := remote(self.bus)) is not None:
            away.send_now()
        deadline = time.monotonic() + self.deadline_s
        self._intake.receive()
        while self._inbox.decided < tick:
            left = deadline - time.monotonic()
            if left <= 0:
                raise ControllerSilent(
                    f"the external controller did not decide on tick {tick} within {self.deadline_s:g} s, and going on"
                    " without it would change the run: resume it with `esper control` beside it"
                )
            self._intake.wait(left)
            self._intake.receive()

    def barrier(self, timeout_s: float = 5.0) -> None:
        """Before a checkpoint counts: put all messages on the server, or after ``timeout_s`` seconds on disk."""
        self._ring.drain()
        for producer in self._remote:
            producer.barrier(timeout_s)

    def state(self) -> dict[str, Any]:
        """The state for a checkpoint after ``end_tick``, JSON-able, with which the next tick has the same commands."""
        self._intake.receive()
        self.safe.copied()
        return self._inbox.state()

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from ``state``."""
        self._inbox.load_state(state)

    def counts(self) -> dict[str, int]:
        """Sent, received, dropped …, for ``summary.json``."""
        return self.bus.counts() | {
            "commands_repeated": self._inbox.repeated,
            "alerts_held_back": self._limit.held_back,
        }

    def close(self) -> None:
        """Flush and release the streams; the caller that opened the bus closes it."""
        self._ring.drain()
        if self._thread is not None and self._over:
            self._thread.join()
        if self.finished:  # a run that is killed or fails may go on later, and its commands with it
            self._intake.receive()
            self._inbox.refuse_rest("the run ended before it could be applied", self.watched.tick)
            self.safe.release()
        for producers in self._out.values():
            for producer in producers:
                producer.close()
        for exporter in self._exporters:
            exporter.close()
        self._intake.close()

    # --- inside ---

    def _export(self) -> None:
        """Start the exporters that ``bus.metrics_port`` and ``bus.otlp`` ask for."""
        config = self.bus.config

        def source() -> list[Reading]:
            return readings(self.bus, self.run, self.watched)

        if config.metrics_port:
            self._exporters.append(PrometheusEndpoint(config.metrics_port, source, self.watched))
        if config.otlp:
            self._exporters.append(OtlpExporter(config.otlp, self.run, config.name, source, self.watched))

    def _refuse(self, command_id: str) -> None:
        """Say on the server that a command of a second controller was refused."""
        refusal = Acknowledgement(command_id=command_id, status="refused", reason=SECOND_CONTROLLER, tick=self.watched.tick)
        self._out["acks"][-1].publish(refusal)

    def _incidents(self, tick: int, end: bool = False) -> None:
        """Publish the incidents of the bus as alerts, from the trainer's thread, so that the order of events is its own."""
        held_back = self._limit.over()
        incidents = self.bus.incidents
        while incidents:
            if said := self._limit.offer(*incidents.popleft(), tick):
                code, text = said
                self.emit(Alert(tick=tick, level=ALERTS.get(code, "warning"), code=code, text=text))
        for sentence in held_back + (self._limit.over(end=True) if end else []):
            self.emit(Alert(tick=tick, level="info", code=CODE, text=sentence))

    def _telemetry(self, message: Telemetry) -> None:
        self._publish("telemetry", message)

    def _acknowledge(self, message: Acknowledgement) -> None:
        self._publish("acks", message)

    def _publish(self, stream: str, message: Message) -> None:
        for producer in self._out[stream]:
            producer.publish(message)
