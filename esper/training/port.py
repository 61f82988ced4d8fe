"""The engine's side of the bus: what it says, and the commands it is given. ``NullPort`` says nothing to nobody."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from esper.seeds import COLUMNS


class Port(Protocol):
    """Called by the engine at tick boundaries only; no call may wait for a network.

    ``decided``: whether anybody may ever command over it.
    """

    decided: bool

    def started(self, tick: int, total_ticks: int, sites: list[dict[str, Any]]) -> None:
        """The run begins; one dict a site."""

    def ended(self, tick: int, status: str, summary: dict[str, Any]) -> None:
        """The run is over: FINISHED, FAILED or KILLED."""

    def transition(
        self,
        tick: int,
        site: str,
        seed: int,
        branch: int,
        source: int,
        target: int,
        cause: str,
        generation: int,
        blueprint: str,
        strategy: str,
    ) -> None:
        """A seed changed stage."""

    def gate(
        self, tick: int, site: str, seed: int, branch: int, gate: str, value: float, threshold: float, passed: bool, look: int
    ) -> None:
        """A gate was asked."""

    def alert(self, tick: int, level: str, code: str, text: str, site: str, seed: int) -> None:
        """Something a person should see."""

    def metrics(self, tick: int, values: dict[str, float]) -> None:
        """Scalars of the run."""

    def slot(self, site: str, seeds: int) -> Tensor:
        """Where to write the site's next rows: float32 ``[seeds, len(COLUMNS)]`` on the CPU, holding anything.

        With ``telemetry`` it becomes the port's again.
        """

    def telemetry(self, tick: int, site: str, rows: Tensor) -> None:
        """Rows of one site, in its ``slot`` or elsewhere: float32 ``[seeds, len(COLUMNS)]`` on the CPU."""

    def report(self, tick: int, command_id: str, stages: dict[str, int], branches: list[dict[str, Any]]) -> None:
        """Answer to a request for a report."""

    def commands(self, tick: int) -> list[Any]:
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

    def started(self, *_: Any) -> None: ...
    def ended(self, *_: Any) -> None: ...
    def transition(self, *_: Any) -> None: ...
    def gate(self, *_: Any) -> None: ...
    def alert(self, *_: Any) -> None: ...
    def metrics(self, *_: Any) -> None: ...
    def telemetry(self, *_: Any) -> None: ...
    def report(self, *_: Any) -> None: ...
    def acknowledge(self, *_: Any) -> None: ...
    def end_tick(self, tick: int) -> None: ...
    def close(self) -> None: ...

    def slot(self, site: str, seeds: int) -> Tensor:
        """A place of no port's."""
        return torch.empty(seeds, len(COLUMNS))

    def commands(self, tick: int) -> list[Any]:
        """Nobody commands."""
        return []
