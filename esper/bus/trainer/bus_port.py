"""The trainer's side of the bus: what happened goes out, commands come in, and a step never waits for a server."""

from __future__ import annotations

import time
from typing import Any, Protocol

from torch import Tensor

from esper.bus.monitor.exporters import OtlpExporter, PrometheusEndpoint
from esper.bus.monitor.readings import PortState, Reading, readings
from esper.bus.protocol import Bus, Delivery, Producer
from esper.bus.trainer.alert_limit import CODE, AlertLimit
from esper.bus.trainer.background_thread import Background
from esper.bus.trainer.command_inbox import CONTROLLER, Inbox
from esper.bus.trainer.receiver import Receiver, Safekeeping
from esper.bus.trainer.telemetry_ring import TelemetryRing
from esper.errors import UserError
from esper.messages import (
    Acknowledgement,
    Alert,
    Checkpoint,
    Command,
    Decided,
    Message,
    RunEnded,
    RunStarted,
    Telemetry,
    TickEnded,
    Transition,
)

TIMINGS = ("lockstep", "free")
ALERTS = {"bus_up": "info"}  # level of an incident of the bus; the others are warnings
SECOND_CONTROLLER = (
    "a command came over the server in the name of the controller, but this run's own process decides, so it is not applied:"
    " give commands under another name, or start the run with controller.process=external"
)


class ControllerSilent(UserError):
    """An external controller missed its deadline: save a checkpoint and stop, since going on would change the bits."""


class Runner(Protocol):
    """A controller in the training process."""

    def step(self, tick: int) -> None:
        """Decide on everything said up to ``tick``, and send the commands."""

    def serve(self) -> str | None:
        """Decide on every tick that ends until the run does."""

    def complaints(self) -> list[str]:
        """What the controller raised since this was last asked."""


class BusPort:
    """Implements the engine's Port over a bus.

    Parts of the training process that read the bus (an in-process controller or tracker) attach their consumers to
    ``bus.local`` before ``started``; a stream that nobody in the process reads is not kept for it.

    Args:
        bus: from ``open_bus``.
        run: name of the run.
        columns: names of the telemetry columns.
        runner: the in-process controller, None when there is none or it is external.
        timing: ``lockstep`` (what a tick leads to is applied at the next) or ``free`` (applied when it comes).
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
        self._remote: list[Producer] = []
        self._commands = bus.local.consumer("commands", run, "trainer", "trainer")
        self._receiver: Receiver | None = None
        self._unfinished: dict[str, Delivery] = {}
        self.safe = Safekeeping(lambda delivery: self._receiver.done(delivery))
        self._inbox = Inbox(self._acknowledge, self._ended)
        self._thread: Background | None = None
        self._over = self.finished = False
        self.watched = PortState()
        self._inbox.measure = self.watched.finished
        self._exporters: list[PrometheusEndpoint | OtlpExporter] = []
        self._limit = AlertLimit()

    # --- what the trainer says ---

    def started(self, tick: int, total_ticks: int, sites: list[dict[str, Any]]) -> None:
        """Open the streams and say that the run begins (or goes on) at ``tick``.

        A run that stopped because its controller was silent waits here for that decision; raises ControllerSilent.
        """
        served = self.bus.local is not self.bus
        for stream, producers in self._out.items():
            if self.bus.local.has_readers(stream, self.run):
                producers.append(self.bus.local.producer(stream, self.run))
            if served:
                self._remote.append(self.bus.producer(stream, self.run))
                producers.append(self._remote[-1])
        if served:
            self._receiver = Receiver(
                self.bus.consumer("commands", self.run, "trainer", "trainer"),
                lambda code, sentence: self.bus.incidents.append((code, sentence)),
            )
            self._ring.deferred = not self._out["telemetry"][:-1]  # nobody in this process reads it at the tick's end
            self.bus.writer.each_round(self._ring.send_full)
            self.bus.writer.each_round(lambda: self._ring.drain(self.bus.config.flush_s))
        if self.external:
            self._inbox.epoch = self._remote[-1].epoch
        if self.runner is not None and self.timing == "free":
            self._thread = Background(self.runner.serve, "esper-controller")
        self.watched.started(tick, sites)
        self._export()
        self.emit(RunStarted(tick=tick, total_ticks=total_ticks, sites=sites))
        if self.external and self.timing == "lockstep" and self._inbox.decided < self._inbox.owed[0]:
            self._wait(self._inbox.owed[0])

    def ended(self, tick: int, status: str, summary: dict[str, Any]) -> None:
        """Say that the run is over, after everything else has been said."""
        self._ring.drain()
        self._incidents(tick, end=True)
        self.emit(RunEnded(tick=tick, status=status, summary=summary))
        self._over, self.finished = True, status == "FINISHED"

    def emit(self, event: Message) -> None:
        """Say what happened.

        A Checkpoint was written and verified; one with an empty ``path`` says that its state was taken, and is on its way to the disk.
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
        """Publish rows (float32 ``[seeds, columns]``, CPU): a filled ``slot`` as it is, others by copying them into the ring."""
        self._ring.put(tick, site, rows)

    # --- what it is told ---

    def commands(self, tick: int) -> list[Command]:
        """What is to be applied now, emergency stops first."""
        self._receive()
        return self._inbox.due(tick)

    def acknowledge(self, command_id: str, status: str, reason: str, tick: int) -> None:
        """End a command that ``commands`` handed out: applied, refused or expired, exactly once."""
        self._inbox.finish(command_id, status, reason, tick)

    def end_tick(self, tick: int) -> None:
        """All about this tick has been said: in lockstep the controller decides now, and is waited for.

        Raises ControllerSilent when an external one does not answer within ``deadline_s`` seconds.
        """
        self.watched.tick = tick
        controlled = self.external or self.runner is not None
        if controlled:
            self._ring.drain()
        elif self.bus.local is self.bus:  # no writer thread looks for what has waited long enough
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
        self.bus.writer.send_now()
        deadline = time.monotonic() + self.deadline_s
        self._receive()
        while self._inbox.decided < tick:
            left = deadline - time.monotonic()
            if left <= 0:
                raise ControllerSilent(
                    f"the external controller did not decide on tick {tick} within {self.deadline_s:g} s, and going on"
                    " without it would change the run: resume it with `esper control` beside it"
                )
            self._receiver.wait(left)
            self._receive()

    def barrier(self, timeout_s: float = 5.0) -> None:
        """Before a checkpoint counts: all that was said is on the server, or after ``timeout_s`` seconds on disk."""
        self._ring.drain()
        for producer in self._remote:
            producer.barrier(timeout_s)

    def state(self) -> dict[str, Any]:
        """What a checkpoint taken after ``end_tick`` needs to give the same commands at the next tick (JSON-able)."""
        self._receive()
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
        """Flush and release the streams; the bus itself is closed by whoever opened it."""
        self._ring.drain()
        if self._thread is not None and self._over:
            self._thread.join()
        if self.finished:  # what is killed or fails may go on later, and its commands with it
            self._receive()
            self._inbox.refuse_rest("the run ended before it could be applied", self.watched.tick)
            self.safe.release()
        for producers in self._out.values():
            for producer in producers:
                producer.close()
        self._commands.close()
        for exporter in self._exporters:
            exporter.close()
        if self._receiver is not None:
            self._receiver.close()

    # --- inside ---

    def _export(self) -> None:
        """Start what ``bus.metrics_port`` and ``bus.otlp`` ask for."""
        config = self.bus.config

        def source() -> list[Reading]:
            return readings(self.bus, self.run, self.watched)

        if config.metrics_port:
            self._exporters.append(PrometheusEndpoint(config.metrics_port, source, self.watched))
        if config.otlp:
            self._exporters.append(OtlpExporter(config.otlp, self.run, config.name, source, self.watched))

    def _receive(self) -> None:
        while deliveries := self._commands.read(1000):
            for delivery in deliveries:
                self._take(delivery)
            self._commands.ack(deliveries)
        if self._receiver is None:
            return
        for delivery in self._receiver.taken():
            command = delivery.message
            if delivery.producer == CONTROLLER and not self.external:
                self._receiver.done(delivery)
                self._refuse(command)
                continue
            if isinstance(command, Command) and not isinstance(command, Decided):
                self._unfinished[command.id] = delivery  # acknowledged on the server when it has ended
            else:
                self._receiver.done(delivery)
            self._take(delivery)

    def _take(self, delivery: Delivery) -> None:
        if isinstance(delivery.message, Command):
            self._inbox.arrive(delivery.producer, delivery.message, delivery.time)
        else:  # whoever may write there can send anything: nothing to obey
            self.bus.counters.add("refused")

    def _refuse(self, message: Message) -> None:
        """What a second controller says is said in an alert and counted; only the server, where it reads, is told of its end.

        A twin of our own controller uses the same ids: those that are known here end by themselves, once.
        """
        self.bus.counters.add("refused")
        self.bus.incidents.append(("bus_second_controller", SECOND_CONTROLLER))
        if isinstance(message, Command) and not isinstance(message, Decided) and not self._inbox.knows(message.id):
            refusal = Acknowledgement(command_id=message.id, status="refused", reason=SECOND_CONTROLLER, tick=self.watched.tick)
            self._out["acks"][-1].publish(refusal)

    def _ended(self, command_id: str) -> None:
        delivery = self._unfinished.pop(command_id, None)
        if delivery is None:
            return
        if delivery.producer == CONTROLLER:  # of a run that goes on from a checkpoint, it decides again
            self._receiver.done(delivery)
        else:
            self.safe.ended(delivery)

    def _incidents(self, tick: int, end: bool = False) -> None:
        """What happened to the bus itself, said from the trainer's thread so that the order of events is its own."""
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
