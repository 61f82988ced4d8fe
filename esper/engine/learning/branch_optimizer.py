"""AdamW for branches: every slot has its own moments, step count and warm-up, and a slot that does not learn is not touched.

Where ``BranchLearning`` says so, matrices learn by Muon; its momentum lies where AdamW's first moment would.

A stock AdamW would decay frozen rows and move them by old momentum, and adding parameter groups breaks torch's schedulers;
so the host's optimizer never sees a branch, and follows only in the learning rate: the host's present factor times the
slot's own warm-up.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from esper.blueprints import SlotBank
from esper.engine.device_readings import Readings
from esper.engine.learning.branch_rows import BankRows, BlockRows, Rows, SlotRows, by_bank
from esper.engine.learning.branch_rows import BranchLearning as BranchLearning
from esper.engine.learning.branch_step import BranchStep, Moved, shaped
from esper.engine.learning.muon import MuonAdamW
from esper.errors import UserError
from esper.lifecycle.transitions import BLENDED
from esper.seeds import Branch, SeedRegistry

PATIENCE = 10
"""Steps in a row for which a branch's gradient may overflow under a loss scale. The scale may still fall, as it does while it
is being found; a branch that overflows longer would never learn at the scale that suits its host."""


class GradientNorms(Mapping[int, float]):
    """L2 norms of the last step's gradients by branch. Those of a whole bank stay a tensor until one of them is read."""

    def __init__(self) -> None:
        self._known: dict[int, float] = {}
        self._later: list[tuple[BankRows | BlockRows, Tensor]] = []

    def add(self, branch: Branch, norm: float) -> None:
        """Note the norm of one branch."""
        self._all()[branch.id] = norm

    def add_later(self, part: BankRows | BlockRows, norms: Tensor) -> None:
        """Note the norms of ``part``'s branches, which stand at its ``places`` in ``norms``."""
        self._later.append((part, norms))

    def clear(self) -> None:
        """Forget all norms."""
        self._known, self._later = {}, []

    def _all(self) -> dict[int, float]:
        for part, norms in self._later:
            values = norms.tolist()
            self._known.update((branch.id, values[place]) for branch, place in zip(part.branches, part.places, strict=True))
        self._later = []
        return self._known

    def __getitem__(self, branch: int) -> float:
        return self._all()[branch]

    def __iter__(self) -> Iterator[int]:
        return iter(self._all())

    def __len__(self) -> int:
        return len(self._all())


class BranchOptimizer:
    """Steps the learning branches of a registry; ``failures`` counts steps refused for a non-finite gradient, by branch.

    Of a gradient that was scaled for half precision, only the last of ``PATIENCE`` such steps in a row is a failure.

    On a GPU nothing waits for the device: a branch whose gradient is not finite is held on the device at once, and norms and failures
    are known when ``readings`` arrive.
    """

    def __init__(self, registry: SeedRegistry, learning: BranchLearning, readings: Readings | None = None) -> None:
        self.registry = registry
        self.learning = learning
        self.readings = Readings(registry.device) if readings is None else readings
        self._overflown = True  # not known yet
        self._groups: tuple[list[Branch], dict[tuple[int, str], list[Branch]]] = [], {}
        self._masks: dict[tuple[int, str], tuple[SlotBank, list[int], Tensor]] = {}
        self.failures: dict[int, int] = {}
        self.norms = GradientNorms()
        self.scaled: frozenset[int] = frozenset()

    def unscale(self, branches: list[Branch], scale: float) -> None:
        """Undo the loss scale of the task's gradients; gradients from an objective were never scaled."""
        for branch in branches if scale != 1.0 else ():
            bank = self.registry.layers[branch.site].bank(branch.blueprint)
            if branch.stage in BLENDED:
                bank.scale_gradient(branch.slot, 1.0 / scale)

    @torch.no_grad()
    def step(self, branches: list[Branch], factor: float, scaled: frozenset[int] = frozenset()) -> None:
        """One step of the given branches with ``lr · factor · warm-up``; uses and then drops the present gradients.

        ``scaled`` are the branches whose gradient came in under a loss scale. ``norms`` then holds the L2 norm of the gradient
        of each branch that had one, before clipping; one that overflowed under the scale has none.
        """
        self.scaled = scaled
        if self.readings.late:
            self._step_on_device(branches, factor)
            self.clear()
            return
        rows: list[Rows] = []
        for (site, blueprint), group in by_bank(branches).items():
            bank = self.registry.layers[site].bank(blueprint)
            rows += [SlotRows(bank, group)] if isinstance(bank, SlotBank) else [BlockRows(bank, branch) for branch in group]
        self.norms.clear()
        self._step([row for row in rows if row.gradients], factor)
        self.clear()

    def _step_on_device(self, branches: list[Branch], factor: float) -> None:
        """Whole banks at once, each in one launch with Triton; a mask says which slots may move."""
        self.readings.post([], lambda _: self.norms.clear())
        found: list[BankRows | BlockRows] = []
        if branches != self._groups[0]:
            self._groups = branches, by_bank(branches)
        for key, group in self._groups[1].items():
            bank = self.registry.layers[key[0]].bank(key[1])
            if isinstance(bank, SlotBank):
                found.append(BankRows(bank, group, self._mask(key, bank, group)))
            else:
                found += [BlockRows(bank, branch) for branch in group]
        found = [part for part in found if part.gradients]
        if not found:
            self.norms.clear()
        kernels = self.registry.kernels
        fused = kernels is not None and kernels.usable_on(self.registry.device) and self.learning.rule == "adamw"
        alone = [part for part in found if fused and isinstance(part, BankRows) and part.for_kernel]
        self.readings.post([part.step(self.learning, factor) for part in alone], partial(self._noted, alone, self.scaled))
        rows = [part for part in found if part not in alone]
        if not rows:
            return
        squares = [_squares(part) for part in rows]
        moving = [part.learning & torch.isfinite(square) for part, square in zip(rows, squares, strict=True)]
        steps = torch.cat([part.count(mine) for part, mine in zip(rows, moving, strict=True)])
        for part, mine in zip(rows, moving, strict=True):
            part.gradients = [torch.where(shaped(mine, gradient), gradient, 0.0) for gradient in part.gradients]
        self.readings.post([square.sqrt() for square in squares], partial(self._noted, rows, self.scaled))
        self._move(rows, torch.cat(squares), steps, factor, torch.cat(moving))

    def _mask(self, key: tuple[int, str], bank: SlotBank, branches: list[Branch]) -> Tensor:
        slots = [branch.slot for branch in branches]
        known = self._masks.get(key)
        if known is None or known[0] is not bank or known[1] != slots or len(known[2]) != bank.capacity:
            known = self._masks[key] = (bank, slots, BankRows.learning_slots(bank, branches))
        return known[2]

    def _noted(self, rows: Sequence[BankRows | BlockRows], scaled: frozenset[int], norms: list[Tensor]) -> None:
        clean, self._overflown = not self._overflown, False
        sound = bool(norms) and bool(torch.isfinite(torch.cat(norms)).all())
        for part, found in zip(rows, norms, strict=True):
            if clean and sound:
                self.norms.add_later(part, found)
                continue
            values = found.tolist()
            for branch, place in zip(part.branches, part.places, strict=True):
                if self._note_one(branch, values[place], scaled):
                    part.take_back(branch)

    def state(self) -> dict[str, Any]:
        """Failures and norms by branch, for a checkpoint; moments and steps are in the banks."""
        return {
            "failures": {str(branch): count for branch, count in self.failures.items()},
            "norms": {str(branch): norm for branch, norm in self.norms.items()},
        }

    def load(self, state: dict[str, Any]) -> None:
        """Take over a saved state."""
        self.failures = {int(branch): int(count) for branch, count in state["failures"].items()}
        self.norms.clear()
        for branch, norm in state["norms"].items():
            self.norms.add(self.registry.branches[int(branch)], float(norm))

    def clear(self) -> None:
        """Drop every gradient of every branch."""
        for layer in self.registry.layers:
            for bank in layer.banks.values():
                for parameter in bank.stacks.values() if isinstance(bank, SlotBank) else bank.parameters():
                    parameter.grad = None

    def _step(self, rows: list[Rows], factor: float) -> None:
        """All branches at once: a handful of operations over lists of tensors, and one wait for the device."""
        if not rows:
            return
        squares = [_squares(part) for part in rows]
        unsound = self._note(rows, squares)
        if unsound:
            sound = [part.without(unsound) for part in rows if any(branch.id in unsound for branch in part.branches)]
            rows = [part for part in rows if not any(branch.id in unsound for branch in part.branches)]
            rows += [part for part in sound if part is not None and part.branches]
            squares = [_squares(part) for part in rows]
        if rows:
            self._move(rows, torch.cat(squares), torch.cat([part.count() for part in rows]), factor)
            for part in rows:
                part.keep()

    def _move(self, rows: Sequence[Rows | BankRows], squares: Tensor, steps: Tensor, factor: float, moving: Tensor | None = None) -> None:
        """In place; ``squares`` and ``steps`` ``[rows]`` in the order of ``rows``. Rows that are not ``moving`` have a gradient of zero."""
        learning = self.learning
        risen = (steps / learning.warmup).clamp(max=1.0)
        if not all(part.warms for part in rows):
            parts = zip(rows, torch.split(risen, [len(part.values[0]) for part in rows]), strict=True)
            risen = torch.cat([own if part.warms else torch.ones_like(own) for part, own in parts])
        rate = learning.lr * factor * risen
        if moving is not None:
            squares, rate, steps = torch.where(moving, squares, 0.0), torch.where(moving, rate, 0.0), steps.clamp(min=1.0)
        scale = (learning.clip / (squares.sqrt() + 1e-6)).clamp(max=1.0) if learning.clip > 0.0 else None
        step = BranchStep(learning, [len(part.values[0]) for part in rows], scale, rate, steps, moving)
        tensors = [Moved(place, *held) for place, part in enumerate(rows) for held in _tensors(part)]
        if learning.rule == "muon":
            matrices = [flag for part in rows for flag in part.matrices]
            step.muon([one for one, matrix in zip(tensors, matrices, strict=True) if matrix])
            tensors = [one for one, matrix in zip(tensors, matrices, strict=True) if not matrix]
        if tensors:
            step.adamw(tensors)

    def _note(self, rows: list[Rows], squares: list[Tensor]) -> set[int]:
        """Note all gradient norms; the branches whose gradient is not finite. Waits for the device once."""
        branches = [branch for part in rows for branch in part.branches]
        norms = torch.cat(squares).sqrt().tolist()
        return {branch.id for branch, norm in zip(branches, norms, strict=True) if self._note_one(branch, norm, self.scaled)}

    def _note_one(self, branch: Branch, norm: float, scaled: frozenset[int]) -> bool:
        """Note a gradient norm; whether it is not finite."""
        if math.isfinite(norm):
            self.norms.add(branch, norm)
            branch.overflows = 0
            return False
        self._overflown = True
        if branch.id in scaled:
            branch.overflows += 1
        else:
            self.norms.add(branch, norm)
        if branch.id not in scaled or branch.overflows >= PATIENCE:
            self.failures[branch.id] = self.failures.get(branch.id, 0) + 1
        return True


def _tensors(part: Rows | BankRows) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    return zip(part.values, part.gradients, part.first, part.second, strict=True)


def _squares(part: Rows | BankRows) -> Tensor:
    """Squared L2 norm of each row's gradient, float32 ``[rows]``."""
    norms = [torch.linalg.vector_norm(gradient.flatten(1).float(), dim=1) for gradient in part.gradients]
    return torch.stack(norms).square().sum(0)


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
        """The factor of the branches' learning rate in this step; called in every step, so that ``peak`` is known."""
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
