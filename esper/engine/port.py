"""The engine's side of the bus: the messages it sends, and the commands it is given.

``NullPort`` sends nothing. ``controlled_port`` puts a controller into the user's own process, over a bus in memory.
"""

from __future__ import annotations

import json
from typing import Any, Protocol

import torch
from torch import Tensor

from esper.errors import UserError
from esper.grafting import GraftingConfig
from esper.messages import Command, Message
from esper.telemetry_columns import COLUMNS


class Port(Protocol):
    """Called by the engine at tick boundaries only; no call may wait for a network.

    ``decided``: whether commands may ever come over it.
    """

    decided: bool

    def started(self, tick: int, total_ticks: int, sites: list[dict[str, Any]]) -> None:
        """The run begins; one dict a site."""

    def ended(self, tick: int, status: str, summary: dict[str, Any]) -> None:
        """The run has ended: FINISHED, FAILED or KILLED."""

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
        """The result of a command."""

    def end_tick(self, tick: int) -> None:
        """The tick has ended, and all its events were sent; a lockstep controller decides here."""

    def close(self) -> None:
        """Release the port's resources."""


class NullPort:
    """No bus and no controller: events go nowhere, and no command comes."""

    decided = True

    def started(self, tick: int, total_ticks: int, sites: list[dict[str, Any]]) -> None: ...
    def ended(self, tick: int, status: str, summary: dict[str, Any]) -> None: ...
    def emit(self, event: Message) -> None: ...
    def telemetry(self, tick: int, site: str, rows: Tensor) -> None: ...
    def acknowledge(self, command_id: str, status: str, reason: str, tick: int) -> None: ...
    def end_tick(self, tick: int) -> None: ...
    def close(self) -> None: ...

    def slot(self, site: str, seeds: int) -> Tensor:
        """A tensor that no port reuses."""
        return torch.empty(seeds, len(COLUMNS))

    def commands(self, tick: int) -> list[Command]:
        """No commands."""
        return []


RUN = "attached"


def controlled_port(controller: Any, seed: int, debug: bool = False, grafting: GraftingConfig | None = None) -> Port:
    """The port over which ``controller`` hears and commands.

    Args:
        controller: a name (``heuristic``, ``random``, ``none``), a configuration of ``esper.controllers``, or a controller.
        seed: the run's random seed.
        debug: raise the controller's exceptions, instead of continuing without its decision.
        grafting: the run's; with ``learned`` a strategy is chosen for what germinates.

    Raises:
        UserError: a name that there is not, or an object that is no controller.
    """
    if controller == "none":
        return NullPort()
    from esper.bus.config import MemoryConfig
    from esper.bus.memory.bus import MemoryBus
    from esper.bus.trainer.bus_port import BusPort
    from esper.controllers import ControllerRunner
    from esper.controllers.learned_grafting import with_learned_grafting

    decided = _controller(controller, seed)
    decided = decided if grafting is None else with_learned_grafting(decided, grafting, seed)
    bus = MemoryBus(MemoryConfig())
    return BusPort(bus, RUN, COLUMNS, ControllerRunner(bus, RUN, decided, debug=debug))


def _controller(given: Any, seed: int) -> Any:
    from esper.controllers import CONFIGS

    if isinstance(given, str):
        if given not in CONFIGS:
            raise UserError(f"There is no controller '{given}'; there are {', '.join(CONFIGS)}.")
        return CONFIGS[given]().build(seed)
    if callable(getattr(given, "build", None)):
        return given.build(seed)
    missing = [name for name in ("observe", "decide", "state", "load_state") if not callable(getattr(given, name, None))]
    if missing:
        raise UserError(f"{type(given).__name__} is no controller: it has no method {missing[0]}; see docs/own-controller.md.")
    return given


def memory_of(port: Any) -> dict[str, str] | None:
    """The memory of the controller behind ``port`` and of the port itself, as JSON; None without a controller in this process."""
    runner = _runner(port)
    if runner is None:
        return None
    runner.hear()
    return {"runner": json.dumps(runner.state()), "port": json.dumps(port.state())}


def remind(port: Any, memory: dict[str, str] | None) -> None:
    """Give a port that has not started the memory that an earlier one had.

    Raises:
        UserError: the memory is another controller's, or there is a memory and no controller.
    """
    if memory is None:
        return
    runner = _runner(port)
    if runner is None:
        raise UserError("The state holds a controller's memory, and no controller was given to go on with it; give the same one.")
    try:
        runner.load_state(json.loads(memory["runner"]))
        port.load_state(json.loads(memory["port"]))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError("The state holds the memory of another controller; attach with the one it was saved with.") from error


def _runner(port: Any) -> Any:
    """The controller's runner in this process, if the port has one."""
    runner = getattr(port, "runner", None)
    return runner if hasattr(runner, "load_state") else None
