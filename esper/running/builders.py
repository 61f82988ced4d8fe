"""Building the parts of a run from its config."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from esper.blueprints import blueprint_of
from esper.config import RootConfig, listing, nearest, options
from esper.controllers import Controller
from esper.engine.port import Port
from esper.errors import UserError
from esper.export.saved_model import load_weights
from esper.messages import RunStarted
from esper.randomness import generator
from esper.tasks.base import Task
from esper.trainer.device import is_out_of_memory
from esper.trainer.trainer import Growth, Trainer


def build_host(config: RootConfig, task: Task) -> nn.Module:
    """The host with initial weights from the run's seed, or those that ``model.weights`` names, with what had grown there."""
    host: nn.Module = config.model.build(task, generator(config.seed, "host"))
    return load_weights(host, config.model.weights) if config.model.weights else host


def build_controller(config: RootConfig, task: Task) -> Controller:
    """What decides about the seeds.

    Raises:
        UserError: a strategy that there is not, which every germination would meet; a metric that the task does not give, whose
            plateau would never come, or with the wrong direction, whose plateau would come while it gets better.
    """
    strategy = getattr(config.controller, "strategy", "")
    known = options("grafting")
    if strategy and strategy not in known:
        raise UserError(
            f"controller.strategy={strategy} is not accepted: grafting is {listing(known)}{nearest(strategy, known)}; "
            "empty means the run's own."
        )
    if hasattr(config.controller, "metric"):
        _check_metric(config.controller.metric, config.controller.direction, task)
    controller: Controller = config.controller.build(config.seed)
    return controller


def _check_metric(name: str, direction: str, task: Task) -> None:
    directions = {"train/loss": "min", "validation/loss": "min"}
    directions |= {f"validation/{metric}": known.direction for metric, known in task.metrics.items()}
    if name not in directions:
        near = nearest(name, directions)
        raise UserError(f"controller.metric={name} is no metric of task={task.name}; there are {listing(directions)}{near}.")
    if direction != directions[name]:
        raise UserError(
            f"controller.direction={direction} is not accepted: {name} gets better towards its {directions[name]}imum; "
            f"set controller.direction={directions[name]}."
        )


def refuse_idle(config: RootConfig, task: Task, trainer: Trainer) -> None:
    """Raise UserError for a controller that could never do anything in this run: tell a copy of it of the run's start.

    A controller of the user's own is left to the run: nobody knows what making it twice would do.
    """
    if config.controller.name != "custom":
        grow = trainer.grow
        started = RunStarted(tick=0, total_ticks=grow.settings.total_ticks, sites=grow.observer.site_cards())
        build_controller(config, task).observe(started)


def build_growth(config: RootConfig) -> Growth:
    """How the host may grow, from the groups that say so."""
    decided = config.controller.name != "none" or config.bus.name != "memory"  # over a server anybody may command
    blueprint = config.blueprint.build() if config.blueprint.name == "custom" else blueprint_of(config.blueprint)
    grafting = config.grafting.build() if config.grafting.name == "custom" else config.grafting
    return Growth(config.sites, blueprint, config.lifecycle, grafting, config.telemetry, config.kernel, decided)


def build_trainer(
    config: RootConfig, task: Task, device: torch.device, port: Port | None = None, steps: int | None = None, state: Any = None
) -> Trainer:
    """The training of a run; ``steps`` overrides its length (controls), ``state`` is a checkpoint's to go on from.

    Raises:
        UserError: parts that do not fit each other, or the memory.
    """
    growth = build_growth(config)
    try:
        host = build_host(config, task)
        return Trainer(host, task, config.trainer, config.optimizer, config.scheduler, growth, config.seed, device, port, steps, state)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(f"model={config.model.name} does not fit into memory; make it smaller, or use a machine with more.") from error
