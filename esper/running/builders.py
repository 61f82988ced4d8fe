"""From a config to the parts of a run: host, controller, growth, trainer, and the description that its trackers are given."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import nn

from esper.blueprints import blueprint_of
from esper.config import GROUPS, RootConfig, config_hash, default_options, did_you_mean, listing, options, plain
from esper.controllers import Controller
from esper.distributed import Ranks
from esper.engine.port import Port
from esper.errors import UserError
from esper.export.saved_model import load_weights
from esper.messages import RunStarted
from esper.randomness import generator
from esper.running.provenance import git_state
from esper.tasks.base import SETS, Task
from esper.tracking import DatasetInfo, RunInfo, SeveralTrackers, differences, readable_name
from esper.trainer.device import is_out_of_memory
from esper.trainer.trainer import Growth, Trainer

#: Groups whose option every run states, so that columns can be filtered by them.
CHOSEN = ("model", "task", "controller", "blueprint", "grafting")


def build_host(config: RootConfig, task: Task) -> nn.Module:
    """The host with initial weights from the run's seed, or those that ``model.weights`` names, with the branches that had grown there."""
    host: nn.Module = config.model.build(task, generator(config.seed, "host"))
    return load_weights(host, config.model.weights) if config.model.weights else host


def build_controller(config: RootConfig, task: Task) -> Controller:
    """The controller, which decides about the seeds.

    Raises:
        UserError: an unknown strategy, on which every germination would fail; a metric that the task does not have, which would
            never reach a plateau; or the wrong direction of a metric, which would take an improvement for a plateau.
    """
    strategy = getattr(config.controller, "strategy", "")
    known = options("grafting")
    if strategy and strategy not in known:
        raise UserError(
            f"controller.strategy={strategy} is not accepted: grafting is {listing(known)}, or empty for the run's own"
            f"{did_you_mean(strategy, known)}"
        )
    if hasattr(config.controller, "metric"):
        _check_metric(config.controller.metric, config.controller.direction, task)
    from esper.controllers.learned_grafting import with_learned_grafting

    return with_learned_grafting(config.controller.build(config.seed), config.grafting, config.seed)


def _check_metric(name: str, direction: str, task: Task) -> None:
    directions = {"train/loss": "min", "validation/loss": "min"}
    directions |= {f"validation/{metric}": known.direction for metric, known in task.metrics.items()}
    if name not in directions:
        near = did_you_mean(name, directions)
        raise UserError(f"controller.metric={name} is no metric of task={task.name}; there are {listing(directions)}{near}")
    if direction != directions[name]:
        raise UserError(
            f"controller.direction={direction} is not accepted: {name} gets better towards its {directions[name]}imum; "
            f"set controller.direction={directions[name]}."
        )


def refuse_idle(config: RootConfig, task: Task, trainer: Trainer) -> None:
    """Raise UserError for a controller that could never act in this run, found by sending the run's start to a copy of it.

    A controller of the user's own is left to the run, since building it twice might have side effects.
    """
    if config.controller.name != "custom":
        grow = trainer.grow
        started = RunStarted(tick=0, total_ticks=grow.settings.total_ticks, sites=grow.observer.site_cards())
        build_controller(config, task).observe(started)


def build_growth(config: RootConfig) -> Growth:
    """How the host may grow, from the groups of the config that concern growth."""
    decided = config.controller.name != "none" or config.bus.name != "memory"  # over a server anybody may command
    blueprint = config.blueprint.build() if config.blueprint.name == "custom" else blueprint_of(config.blueprint)
    grafting = config.grafting.build() if config.grafting.name == "custom" else config.grafting
    parts = config.sites, blueprint, config.lifecycle, grafting, config.telemetry, config.kernel, config.flags
    return Growth(*parts, decided)


def build_trainer(
    config: RootConfig,
    task: Task,
    device: torch.device,
    port: Port | None = None,
    steps: int | None = None,
    state: Any = None,
    ranks: Ranks | None = None,
) -> Trainer:
    """The training of a run; ``steps`` overrides its length (controls), ``state`` is that of a checkpoint to continue from.

    ``ranks`` are the processes that share it; default this one alone.

    Raises:
        UserError: parts that do not fit each other, or the memory.
    """
    growth = build_growth(config)
    try:
        parts = build_host(config, task), task, config.trainer, config.optimizer, config.scheduler, growth, config.seed, device
        return Trainer(*parts, port, steps, state, ranks)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(f"model={config.model.name} does not fit into memory; make it smaller, or use a machine with more.") from error


def describe_run(config: RootConfig, task: Task, folder: Path, started_ms: int) -> RunInfo:
    """The identity of a run: name, tags, data set, and the parameters that differ from the defaults."""
    tree = plain(config)
    changed = differences(tree, _defaults(config))
    chosen = {group: _called(getattr(config, group)) for group in CHOSEN}
    usual = f"{config.model.name}-{config.task.name}"
    what = f"{chosen['model']}-{chosen['task']}" if config.name == usual else config.name
    git = git_state()
    sizes = {which: len(getattr(task, which)) for which in SETS}
    tags = {
        "config_hash": config_hash(config),
        "git_commit": git["commit"] + ("+changed" if git["changed"] else ""),
        "seed": str(config.seed),
        "arm": config.arm,
        "experiment": config.experiment,
        "tags": ",".join(config.tags),
    }
    return RunInfo(
        run=folder.name,
        name=readable_name(what, changed | _choices(config, chosen), config.seed, config.arm),
        folder=str(folder),
        outputs=str(Path(config.output).resolve()),
        started_ms=started_ms,
        config=tree,
        changed={key: value for key, value in changed.items() if key not in {f"{group}.name" for group in CHOSEN}},
        chosen=chosen,
        tags={name: value for name, value in tags.items() if value},
        dataset=DatasetInfo(name=task.name, digest=task.digest, description=task.description, sizes=sizes),
        primary=f"validation/{task.primary}",
        direction=task.metrics[task.primary].direction,
    )


def _called(part: Any) -> str:
    """The option of a group; for a part of the user's own, the class or function that it names."""
    target = str(getattr(part, "target", ""))
    return target.rpartition(":")[2] or str(part.name)


def _choices(config: RootConfig, chosen: dict[str, str]) -> dict[str, str]:
    """The options of all groups that differ from those of conf/config.yaml, as settings in a run's name."""
    usual = default_options()
    names = {group: chosen.get(group) or str(getattr(getattr(config, group), "name", usual[group])) for group in usual}
    return {f"{group}.name": name for group, name in names.items() if name != usual[group]}


def _defaults(config: RootConfig) -> dict[str, Any]:
    """The configuration without any override, as the dataclasses hold it."""
    tree = dataclasses.asdict(RootConfig()) | {"name": config.name, "output": config.output}
    for group in GROUPS:
        chosen = getattr(config, group)
        if isinstance(chosen, SeveralTrackers):
            tree[group] = dataclasses.asdict(SeveralTrackers(trackers={name: options(group)[name]() for name in chosen.trackers}))
        elif chosen is not None:
            tree[group] = dataclasses.asdict(options(group)[chosen.name](name=chosen.name))
    return tree
