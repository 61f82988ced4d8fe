"""What a run's controller has learnt: read from the memory that ``controller.memory`` names, and kept with the run at its end."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from esper.config import RootConfig
from esper.controllers import Controller, ControllerRunner
from esper.controllers.learned_grafting import keep_all
from esper.errors import UserError
from esper.processes import PLACES
from esper.tracking import mlflow_in, tracking_uri

if TYPE_CHECKING:
    from esper.running.connections import Connections, Setup


def recall(config: RootConfig, controller: Controller) -> None:
    """Give a controller the experience of an MLflow experiment; it has read a file by itself. Raises UserError where there is no store."""
    name = getattr(config.controller, "memory", "")
    if not name or name.endswith(".json"):
        return
    mlflow = mlflow_in(config.tracking)
    if mlflow is None or config.controller.process != PLACES[0]:
        raise UserError(
            f"controller.memory={name} is an MLflow experiment, which needs tracking=mlflow and controller.process=internal; "
            "choose them, or name a file that ends in .json."
        )
    from esper.controllers.memory import read_experiment

    learner: Any = controller
    learner.recall(read_experiment(tracking_uri(mlflow, config.output), name))


def remember(setup: Setup, links: Connections, tick: int) -> None:
    """Keep what the controller has learnt, in the run's folder, from which trackers take it, and in the memory file if it has one."""
    runner = links.controller
    if not isinstance(runner, ControllerRunner):
        return
    runner.hear()
    keep_all(runner.controller, getattr(setup.config.controller, "memory", ""), setup.folder, tick)
