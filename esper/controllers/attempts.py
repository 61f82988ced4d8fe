"""Germinations that a controller asked for: those still open, their outcome, and the seeds that rest."""

from __future__ import annotations

from typing import Any

from esper.controllers.view import LOST, Seed
from esper.messages import Acknowledgement, Germinate, Message, Transition


class Attempts:
    """Remembers Germinate commands until their acknowledgement, and lets a refused or lost seed rest."""

    def __init__(self) -> None:
        self.rest_ticks = 0
        self.applied = 0
        self._open: dict[str, Seed] = {}
        self._resting: dict[Seed, int] = {}

    @property
    def open(self) -> list[Seed]:
        """Seeds asked for whose answer has not come."""
        return list(self._open.values())

    def sent(self, command: Germinate) -> None:
        """A command is on its way."""
        self._open[command.id] = (command.site, command.seed)

    def observe(self, message: Message) -> None:
        """Take note of answers and of seeds that lost their branch."""
        if isinstance(message, Acknowledgement) and message.status != "delivered":
            seed = self._open.pop(message.command_id, None)
            if seed is not None and message.status == "applied":
                self.applied += 1
            elif seed is not None:
                self._resting[seed] = message.tick + self.rest_ticks
        elif isinstance(message, Transition) and message.target in LOST:
            self._resting[message.site, message.seed] = message.tick + self.rest_ticks

    def may_try(self, seed: Seed, tick: int) -> bool:
        """Whether the seed neither waits for an answer nor rests at ``tick``."""
        return seed not in self._open.values() and self._resting.get(seed, -1) < tick

    def state(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "applied": self.applied,
            "open": [[id, *seed] for id, seed in self._open.items()],
            "resting": [[*seed, until] for seed, until in self._resting.items()],
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from ``state``."""
        self.applied = state["applied"]
        self._open = {id: (site, seed) for id, site, seed in state["open"]}
        self._resting = {(site, seed): until for site, seed, until in state["resting"]}
