"""A controller in the user's own process: a bus in memory, so that nothing of it is on the way of who needs none."""

from __future__ import annotations

from typing import Any

from esper.errors import UserError
from esper.seeds import COLUMNS
from esper.training.port import NullPort, Port

RUN = "attached"


def controlled_port(controller: Any, seed: int) -> Port:
    """The port over which ``controller`` hears and commands.

    Args:
        controller: a name (``heuristic``, ``random``, ``none``), a configuration of ``esper.controllers``, or a controller.
        seed: the run's random seed.

    Raises:
        UserError: a name that there is not, or an object that is no controller.
    """
    if controller == "none":
        return NullPort()
    from esper.bus.config import MemoryConfig
    from esper.bus.memory import MemoryBus
    from esper.bus.port import BusPort
    from esper.controllers import ControllerRunner

    decided = _controller(controller, seed)
    bus = MemoryBus(MemoryConfig())
    return BusPort(bus, RUN, COLUMNS, ControllerRunner(bus, RUN, decided))


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
