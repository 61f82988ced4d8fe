"""The learning rate of the host's optimizer, as branches follow it."""

from __future__ import annotations

import math
from typing import Any

import torch

from esper.engine.learning.branch_optimizer import BranchLearning
from esper.engine.learning.muon import MuonAdamW
from esper.errors import UserError

DEFAULT = 1e-3
"""Learning rate of branches beside a host whose optimizer's rate means something else to it than to AdamW."""


class HostRate:
    """The host's present learning rate as a factor, read from the parameter group whose schedule starts highest.

    A group's schedule starts at the rate that its scheduler was made with (``max_lr`` under OneCycleLR, which begins far below),
    without a scheduler at the rate it had when esper was attached: ``initial``. Where a schedule climbs beyond its start, as
    CyclicLR does, ``peak`` is the highest multiple so far and the factor counts from there, so that it is never above 1.
    """

    def __init__(self, optimizer: torch.optim.Optimizer | None, state: dict[str, Any] | None = None) -> None:
        self.optimizer = optimizer
        known = (state or {}).get("initial_lr")
        self.initial = [_first(group) for group in self._groups] if known is None else [float(rate) for rate in known]
        self.peak = float((state or {}).get("peak_lr", 1.0))
        self._shared = 0.0

    def learning(self) -> BranchLearning:
        """Settings of branches for which the user gave none: beside an Adam its rate, step by step, and weight decay; else 1e-3.

        Beside ``MuonAdamW`` they learn by the same rules as the host.
        """
        highest = max(self.initial, default=0.0)
        if self.optimizer is None or "adam" not in type(self.optimizer).__name__.lower() or not highest:
            return BranchLearning(DEFAULT)
        self._shared = highest
        group = self._groups[self.initial.index(highest)]
        decay = float(group.get("weight_decay", 0.0))
        if isinstance(self.optimizer, MuonAdamW):
            return BranchLearning(highest, decay, group["betas"], rule="muon", momentum=group["momentum"])
        return BranchLearning(highest, decay)

    def factor(self) -> float:
        """What the branches' rate is multiplied by in this step; asked for in every step, so that ``peak`` is known."""
        starts = [_start(group, first) for group, first in zip(self._groups, self.initial, strict=False)]
        highest = max(starts, default=0.0)
        if not highest:
            return 1.0  # a host that is frozen by its rate has no schedule
        present = float(self._groups[starts.index(highest)]["lr"])
        if self._shared:
            return present / self._shared
        self.peak = max(self.peak, present / highest)
        return present / highest / self.peak

    def state(self) -> dict[str, Any]:
        """The rates that the schedules started from, for a checkpoint; the constructor takes it."""
        return {"initial_lr": list(self.initial), "peak_lr": self.peak}

    @property
    def _groups(self) -> list[dict[str, Any]]:
        return [] if self.optimizer is None else self.optimizer.param_groups


def _start(group: dict[str, Any], first: float) -> float:
    """The rate at which a group's schedule starts; ``first`` where it has none."""
    return float(group.get("max_lr", group.get("initial_lr", first)))


def _first(group: dict[str, Any]) -> float:
    rate = _start(group, float(group["lr"]))
    if not math.isfinite(rate):
        raise UserError(f"The optimizer's learning rate is {rate}; give a finite number.")
    return rate
