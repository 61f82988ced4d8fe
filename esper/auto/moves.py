"""What a model may start as, and the ways in which it may grow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from esper.search.space import Dimension, Space
from esper.tasks.base import Task

TRAIN = "train"  # no growth: the same model, longer
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
UNITS = {"mlp": 16, "cnn": 8, "transformer": 256}  # of the first widening; each that is kept doubles the next

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


def growth_words(growth: Growth, host: str, widened: int, attention: int) -> list[str]:
    """The words by which a run grows so; ``widened`` is how often the model has been widened already."""
    units = UNITS.get(host, 16) * 2**widened
    blueprint = {
        TRAIN: ["controller=none"],
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
