"""What a model may start as, and the ways in which it may grow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from esper.randomness import generator
from esper.search.space import Dimension, Space
from esper.tasks.base import Task

TRAIN = "train"  # no growth: the same model, longer
LARGER = "larger host"  # from new weights: what grew in place may be worse than what was large from the beginning
LENGTH = "length"  # share of the steps that there are for an attempt: small data are learnt by heart in more
LR, DECAY = "optimizer.lr", "optimizer.weight_decay"

#: Small hosts to begin with.
HOSTS: dict[str, list[str]] = {
    "mlp": ["model=mlp", "model.width=16"],
    "cnn": ["model=cnn", "model.channels=[4,8]"],
    "transformer": ["model=transformer", "model.width=64", "model.depth=1"],
}
#: The kinds of growth of a host that bears them; other hosts try those of the perceptron.
KINDS = {"mlp": ("width", "branches"), "cnn": ("width", "depth"), "transformer": ("width", "depth", "heads")}
UNITS = 16  # of the first widening of other hosts

#: Everything germinates at once, is blended in over the first tenth, and learns to the end; the whole run is judged on validation.
GROWING = (
    "controller=scheduled",
    "controller.script=[{at: 0%, command: germinate, site: '*'}]",
    "lifecycle=direct",
    "grafting=linear",
    "grafting.ramp=10%",
)


def host_for(task: Task) -> str:
    """The kind of host that suits a task's inputs."""
    if task.inputs == "tokens":
        return "transformer"
    return "cnn" if len(task.input_shape) in (2, 3) and min(task.input_shape[1:]) >= 8 else "mlp"


def start_words(task: Task, given: Sequence[str]) -> list[str]:
    """The words of the first, small host; the user's own where ``model=`` is among those given."""
    keys = {word.partition("=")[0] for word in given}
    if "model" in keys:
        return []
    return [word for word in HOSTS[host_for(task)] if word.partition("=")[0] not in keys]


def kinds_of(host: str) -> list[str]:
    """The ways to go on from a model of a host."""
    return [*KINDS.get(host, KINDS["mlp"]), *([LARGER] if host in HOSTS else []), TRAIN]


def wider(model: Any, times: int) -> Any:
    """The settings of one of these hosts that is so many times as wide."""
    if model.name == "cnn":
        return replace(model, channels=[times * channels for channels in model.channels])
    return replace(model, width=times * model.width)


def larger_host(model: Any, task: Task, parameters: float) -> tuple[Any, int]:
    """The next doubling of a host that has more parameters than these, and how many it has. Nothing is allocated to find out."""
    times = 1
    while True:
        times *= 2
        found = wider(model, times)
        with torch.device("meta"):
            count = sum(one.numel() for one in found.build(task, generator(0, "host")).parameters())
        if count > parameters:
            return found, count


def host_words(model: Any) -> list[str]:
    """The words for the width of one of these hosts."""
    if model.name == "cnn":
        return [f"model.channels=[{','.join(map(str, model.channels))}]"]
    return [f"model.width={model.width}"]


def settings_space(given: Sequence[str]) -> Space:
    """The settings of the optimizer to search for, without those that the user gives; and how long to learn."""
    keys = {word.partition("=")[0] for word in given}
    found = (Dimension(LR, (), 3e-4, 3e-2, log=True), Dimension(DECAY, (), 1e-4, 0.3, log=True))
    return Space((*(one for one in found if one.key not in keys), Dimension(LENGTH, (), 0.1, 1.0, log=True)))


@dataclass(frozen=True)
class Growth:
    """A way to go on from a model: what grows, the factor on the learning rate, and the share of the steps."""

    kind: str
    factor: float
    length: float


def growth_space(kinds: Sequence[str]) -> Space:
    """The ways to go on from a model, for Optuna to learn which pay."""
    return Space((Dimension("grow", tuple(kinds)), Dimension("factor", (), 0.1, 1.0, log=True), Dimension(LENGTH, (), 0.2, 1.0, log=True)))


def growth_of(values: Mapping[str, str]) -> Growth:
    """The way that a proposal names."""
    return Growth(values["grow"], float(values["factor"]), float(values[LENGTH]))


def growth_words(growth: Growth, model: Any, widened: int, attention: int) -> list[str]:
    """The words by which a run grows so; ``model`` are the host's settings, ``widened`` is how often it has been widened already."""
    hidden = {"mlp": lambda: model.width, "cnn": lambda: max(model.channels), "transformer": lambda: model.width * model.expansion}
    units = hidden.get(model.name, lambda: UNITS)() * 2**widened  # so that each widening doubles the layers
    blueprint = {
        TRAIN: ["controller=none"],
        LARGER: ["controller=none"],
        "width": ["blueprint=width", f"blueprint.units={units}", *GROWING],
        "branches": ["blueprint=mlp", *GROWING],
        "depth": ["blueprint=block", *GROWING],
        "heads": ["blueprint=heads", f"blueprint.heads={attention}", *GROWING],
    }
    return blueprint[growth.kind]


def scaled(values: Mapping[str, str], factor: float, given: Sequence[str]) -> dict[str, str]:
    """The optimizer's settings with the learning rate multiplied, for host and branches."""
    found = {key: text for key, text in values.items() if key != LENGTH}
    rate = float(values.get(LR) or next((word.partition("=")[2] for word in given if word.startswith(f"{LR}=")), 3e-3)) * factor
    keys = {word.partition("=")[0] for word in given}
    found[LR] = f"{rate:.4g}"
    if "optimizer.branch_lr" not in keys:
        found["optimizer.branch_lr"] = f"{rate:.4g}"
    return found
