"""The engine's side of the bus: what it says, and the commands it is given. ``NullPort`` says nothing to nobody."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from esper.messages import COLUMNS, Command, Message


class Port(Protocol):
    """Called by the engine at tick boundaries only; no call may wait for a network.

    ``decided``: whether anybody may ever command over it.
    """

    decided: bool

    def started(self, tick: int, total_ticks: int, sites: list[dict[str, Any]]) -> None:
        """The run begins; one dict a site."""

    def ended(self, tick: int, status: str, summary: dict[str, Any]) -> None:
        """The run is over: FINISHED, FAILED or KILLED."""

    def emit(self, event: Message) -> None:
        """Something happened: a transition, the answer of a gate, an alert, metrics, a report."""

    def slot(self, site: str, seeds: int) -> Tensor:
        """Where to write the site's next rows: float32 ``[seeds, len(COLUMNS)]`` on the CPU, holding anything.

        With ``telemetry`` it becomes the port's again.
        """

    def telemetry(self, tick: int, site: str, rows: Tensor) -> None:
        """Rows of one site, in its ``slot`` or elsewhere: float32 ``[seeds, len(COLUMNS)]`` on the CPU."""

    def commands(self, tick: int) -> list[Command]:
        """The commands to apply now, in order."""

    def acknowledge(self, command_id: str, status: str, reason: str, tick: int) -> None:
        """What became of a command."""

    def end_tick(self, tick: int) -> None:
        """Everything about this tick has been said; a lockstep controller decides here."""

    def close(self) -> None:
        """Release what the port holds."""


class NullPort:
    """No bus and no controller: nothing is said, nobody commands."""

    decided = True

    def started(self, tick: int, total_ticks: int, sites: list[dict[str, Any]]) -> None: ...
    def ended(self, tick: int, status: str, summary: dict[str, Any]) -> None: ...
    def emit(self, event: Message) -> None: ...
    def telemetry(self, tick: int, site: str, rows: Tensor) -> None: ...
    def acknowledge(self, command_id: str, status: str, reason: str, tick: int) -> None: ...
    def end_tick(self, tick: int) -> None: ...
    def close(self) -> None: ...

    def slot(self, site: str, seeds: int) -> Tensor:
        """A place of no port's."""
        return torch.empty(seeds, len(COLUMNS))

    def commands(self, tick: int) -> list[Command]:
        """Nobody commands."""
        return []
