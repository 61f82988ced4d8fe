"""Connects a controller to a run's bus, and keeps its exceptions from ending the run."""

from __future__ import annotations

import copy
import logging
import threading
from typing import Any

from esper.bus.protocol import Bus, Delivery
from esper.controllers.base import Controller, decision
from esper.errors import UserError
from esper.messages import CONTROLLER, Command, Message, RunEnded, TickEnded

ALLOCATOR = "allocator"
"""The producer of answers to local controllers in other processes."""
REPEATED = 3
"""Exceptions in all after which a controller is asked no more."""
_COUNT = "esper: exceptions raised"

log = logging.getLogger(__name__)


class Contained:
    """A controller whose exceptions are caught and counted. A UserError is meant for the user, and ends the run.

    With ``debug`` nothing is caught. ``complaints`` holds the sentences for the bus.
    """

    def __init__(self, controller: Controller, debug: bool = False) -> None:
        self.own = controller
        self.debug = debug
        self.raised = 0
        self.complaints: list[str] = []

    @property
    def dismissed(self) -> bool:
        """Whether it raised so often that it is no longer asked."""
        return self.raised >= REPEATED

    def observe(self, message: Message) -> None:
        """Let the controller take note of a message."""
        if not self.dismissed:
            try:
                self.own.observe(message)
            except Exception as error:
                self._contain(error, f"a {type(message).__name__}")

    def decide(self, tick: int) -> list[Command]:
        """Its commands; none where it raised, or is dismissed."""
        if not self.dismissed:
            try:
                return list(self.own.decide(tick))
            except Exception as error:
                self._contain(error, f"tick {tick}")
        return []

    def said(self) -> list[str]:
        """The sentences since the last call, and those of the controller itself, where it has some."""
        own: list[str] = getattr(self.own, "complaints", [])
        said, self.complaints, own[:] = [*self.complaints, *own], [], []
        return said

    def _contain(self, error: Exception, at: str) -> None:
        if self.debug or isinstance(error, UserError):
            raise error
        self.raised += 1
        what = f"{type(error).__name__}: {' '.join(str(error).split())}"
        if self.raised == 1:
            text = f"the controller {type(self.own).__name__} raised {what} at {at}; training goes on without that decision"
            log.error("%s", text, exc_info=error)
            self.complaints.append(text)
        if self.dismissed:
            text = f"the controller {type(self.own).__name__} has raised {self.raised} exceptions, last {what}, and is asked no more"
            log.error("%s", text)
            self.complaints.append(text)

    def state(self) -> dict[str, Any]:
        """The controller's own state, and the number of its exceptions, if there were any."""
        return {**self.own.state(), **({_COUNT: self.raised} if self.raised else {})}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from ``state``."""
        self.raised = int(state.get(_COUNT, 0))
        self.own.load_state({name: value for name, value in state.items() if name != _COUNT})


#: Events first: they name the sites to which the other messages refer.
_HEARD = ("events", "acks", "telemetry")


class ControllerRunner:
    """Feeds a controller the messages of the run, and sends its commands, each tick's followed by Decided.

    Make it before the run starts: a stream without a reader is not kept.
    """

    def __init__(
        self, bus: Bus, run: str, controller: Controller, name: str = "controller", debug: bool = False, beyond: Bus | None = None
    ) -> None:
        """``beyond`` is the bus over which an allocator hears local controllers in other processes, and answers them."""
        self.controller = controller
        self._proposals = None if beyond is None else beyond.consumer("proposals", run, CONTROLLER, name)
        self._answers = None if beyond is None else beyond.producer("acks", run, ALLOCATOR)
        self._contained = Contained(controller, debug)
        self._consumers = {stream: bus.consumer(stream, run, CONTROLLER, name) for stream in _HEARD}
        self._producer = bus.producer("commands", run, CONTROLLER)
        self._last = TickEnded(tick=-1)
        self._lock = threading.Lock()  # a checkpoint asks for the state from another thread than ``serve``
        self._serving = False

    def step(self, tick: int) -> None:
        """In the training process: decide on all messages up to ``tick``, which the trainer has just ended."""
        self.hear()
        assert self._last.tick == tick, f"asked to decide on tick {tick}, but the last that ended is {self._last.tick}"
        self._decide(self._last)

    def hear(self) -> None:
        """Feed the controller all messages so far, so that its state holds them; does nothing while ``serve`` reads."""
        if self._serving:
            return
        for stream in _HEARD:
            self._hear_all(stream)
        self._hear_proposals()

    def serve(self, block_s: float = 1.0, idle_s: float | None = None) -> str | None:
        """In its own process: decide on every tick that ends, until the run ends.

        Args:
            block_s: how long one read waits, in seconds.
            idle_s: give up after hearing nothing for this long; None waits for ever.

        Returns:
            The status with which the run ended, or None after ``idle_s`` without a word.
        """
        silent_s, self._serving = 0.0, True
        while idle_s is None or silent_s < idle_s:
            deliveries = self._consumers["events"].read(block_s=block_s)
            silent_s = 0.0 if deliveries else silent_s + block_s
            for delivery in deliveries:
                with self._lock:
                    self._hear([delivery])
                    if isinstance(delivery.message, TickEnded):
                        self._hear_all("acks")
                        self._hear_all("telemetry")
                        self._hear_proposals()
                        self._decide(delivery.message)
                self._consumers["events"].ack([delivery])
                if isinstance(delivery.message, RunEnded):
                    return delivery.message.status
        return None

    def _hear_proposals(self) -> None:
        """What local controllers in other processes have said so far; nobody waits for them."""
        while self._proposals is not None and (deliveries := self._proposals.read(1000)):
            for delivery in deliveries:
                self._contained.observe(delivery.message)
            self._proposals.ack(deliveries)

    def _hear_all(self, stream: str) -> None:
        while deliveries := self._consumers[stream].read(1000):
            self._hear(deliveries)
            self._consumers[stream].ack(deliveries)

    def _hear(self, deliveries: list[Delivery]) -> None:
        for delivery in deliveries:
            if isinstance(delivery.message, TickEnded):
                self._last = delivery.message
            self._contained.observe(delivery.message)

    def _decide(self, ended: TickEnded) -> None:
        for command in self._contained.decide(ended.tick):
            self._producer.publish(command)
        self._producer.publish(decision(ended))
        if self._answers is not None:
            answers = getattr(self.controller, "answers", [])
            for answer in answers:
                self._answers.publish(answer)
            answers.clear()

    def state(self) -> dict[str, Any]:
        """The controller's state, JSON-able, for a checkpoint."""
        with self._lock:
            return copy.deepcopy(self._contained.state())

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from ``state``; before the run starts."""
        self._contained.load_state(state)

    def complaints(self) -> list[str]:
        """Sentences about exceptions of the controller since the last call, and what it says itself, for alerts."""
        return self._contained.said()

    def close(self) -> None:
        """Send the remaining commands and release the streams."""
        self._producer.close()
        for consumer in self._consumers.values():
            consumer.close()
        if self._proposals is not None and self._answers is not None:
            self._proposals.close()
            self._answers.close()
