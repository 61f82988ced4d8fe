"""A controller whose exceptions do not end the run: each is counted, the first is logged, and after three it is asked no more."""

from __future__ import annotations

import logging
from typing import Any

from esper.controllers.base import Controller
from esper.errors import UserError
from esper.messages import Command, Message

REPEATED = 3
"""Exceptions in all after which a controller is asked no more."""
_COUNT = "esper: exceptions raised"

log = logging.getLogger(__name__)


class Contained:
    """The controller itself, without its exceptions. A UserError is a sentence for the user, and ends the run as ever.

    With ``debug`` nothing is contained. Sentences for the bus wait in ``complaints``.
    """

    def __init__(self, controller: Controller, debug: bool = False) -> None:
        self.own = controller
        self.debug = debug
        self.raised = 0
        self.complaints: list[str] = []

    @property
    def dismissed(self) -> bool:
        """Whether it is asked no more."""
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
        """The controller's own, and how often it has raised, if it has."""
        return {**self.own.state(), **({_COUNT: self.raised} if self.raised else {})}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from ``state``."""
        self.raised = int(state.get(_COUNT, 0))
        self.own.load_state({name: value for name, value in state.items() if name != _COUNT})
