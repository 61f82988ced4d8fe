"""Building the parts of a run from its config."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from esper.config import RootConfig, listing, nearest, options
from esper.controllers import Controller
from esper.errors import UserError
from esper.randomness import generator
from esper.saved import load_weights
from esper.tasks.base import Task
from esper.training.port import Port
from esper.training.trainer import Growth, Trainer


def build_host(config: RootConfig, task: Task) -> nn.Module:
    """The host with initial weights from the run's seed, or those that ``model.weights`` names, with what had grown there."""
    host: nn.Module = config.model.build(task, generator(config.seed, "host"))
    return load_weights(host, config.model.weights) if config.model.weights else host


def build_controller(config: RootConfig) -> Controller:
    """What decides about the seeds. Raises UserError for a strategy that there is not, which every germination would meet."""
    strategy = getattr(config.controller, "strategy", "")
    known = options("grafting")
    if strategy and strategy not in known:
        raise UserError(
            f"controller.strategy={strategy} is not accepted: grafting is {listing(known)}{nearest(strategy, known)}; "
            "empty means the run's own."
        )
    controller: Controller = config.controller.build(config.seed)
    return controller


def build_growth(config: RootConfig) -> Growth:
    """How the host may grow, from the groups that say so."""
    blueprint, grafting = (part.build() if part.name == "custom" else part for part in (config.blueprint, config.grafting))
    return Growth(config.sites, blueprint, config.lifecycle, grafting, config.telemetry, config.kernel)


def build_trainer(config: RootConfig, task: Task, device: torch.device, port: Port | None = None, steps: int | None = None, state: Any = None) -> Trainer:
    """The training of a run; ``steps`` overrides its length (controls), ``state`` is a checkpoint's to go on from."""
    host = build_host(config, task)
    growth = build_growth(config)
    return Trainer(host, task, config.trainer, config.optimizer, config.scheduler, growth, config.seed, device, port, steps, state)
