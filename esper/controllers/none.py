"""``none``: the host trains alone, its seeds stay dormant."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from esper.messages import Command, Message
from esper.processes import ControllerPlace


@dataclass
class NoneConfig(ControllerPlace):
    """No settings but the place where the controller runs."""

    name: str = "none"

    def build(self, seed: int) -> NoController:
        """The controller; the run's random ``seed`` is not used."""
        return NoController()


class NoController:
    """Sends no command."""

    def observe(self, message: Message) -> None:
        """Take note of nothing."""

    def decide(self, tick: int) -> list[Command]:
        """No command."""
        return []

    def state(self) -> dict[str, Any]:
        """Nothing is remembered."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """There is no state to load."""
