"""The guard protects the host from slow harm, in which no single step looks wrong.

When a branch's blending begins, the guard keeps the host's state and its losses on the judge set as a baseline. If the judge later finds
the host without the branch better, that becomes the baseline. While the branch is blended, a training loss that has risen from its lowest
value is a suspicion. Only then the guard asks the judge set, and removes the branch if its losses are worse than the baseline's, with
confidence. When a branch goes for any reason, and the host without it is worse than the baseline, the host returns to a kept state.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from esper.checkpoint.tree import Still
from esper.engine.judging.judge import Judge, lower_bound
from esper.engine.signals import LossSignal
from esper.engine.snapshot import Snapshot
from esper.engine.transitions import Transitions
from esper.lifecycle import Stage, spent
from esper.messages import Alert
from esper.seeds import Branch

WATCHED = (Stage.GRAFTING, Stage.STABILIZATION, Stage.EVALUATING, Stage.FINE_TUNING)
"""Stages in which a branch is blended and may still be taken away."""


@dataclass(frozen=True)
class KeptHost:
    """Host, optimizer and branches at one tick, with the averages of the training loss as they were then."""

    snapshot: Snapshot
    signal: dict[str, float]


@dataclass
class Baseline:
    """The host without a branch at ``tick``: when its blending began, or later, when it was even better.

    ``losses`` ``[n]`` float64 are those on the judge set (none: no judge), ``began`` their mean and ``fast`` the average
    training loss when the blending began; ``looks`` counts how often they were compared with later ones.
    """

    tick: int
    losses: Tensor
    kept: KeptHost | None
    began: float
    fast: float
    looks: int = 0


def worse(now: Tensor, then: Tensor, error: float) -> bool:
    """Whether paired losses ``[n]`` have risen on average, at error rate ``error``; missing or non-finite ones have."""
    if not now.numel() or now.shape != then.shape or not math.isfinite(float(now.mean())):
        return True
    return lower_bound(now - then, error).bound > 0.0


class Guard:
    """Watches the blended branches of one registry, every ``every`` ticks. Without a judge it only keeps states for rollbacks."""

    def __init__(self, transitions: Transitions, judge: Judge | None, signal: LossSignal, significance: float, every: int) -> None:
        self.transitions = transitions
        self.registry = transitions.registry
        self.judge = judge
        self.signal = signal
        self.significance = significance
        self.every = every
        self.baselines: dict[int, Baseline] = {}
        self.calm: KeptHost | None = None
        self.lowest = math.inf
        self._settled: list[Branch] = []
        """The watched branches at the last ``settle``; every baseline belongs to one of them."""
        self.on_return: Callable[[], None] = lambda: None
        """Called when the host has returned to an earlier state, for which other values are usual."""

    # --- the three calls of a tick ---

    def watch(self, tick: int) -> None:
        """Roll the branch back that harms the host slowly, if there is one; ``settle`` must follow."""
        if self.judge is None or tick % self.every:
            return
        watched = [branch for branch in self.registry.in_stage(*WATCHED) if branch.id in self.baselines]
        if not watched or not self._suspicious(tick):
            return
        now = self._losses([])
        harmful = [branch for branch in watched if self._harmed(self.baselines[branch.id], now)]
        if harmful:
            branch = self._blamed(harmful, now)
            baseline = self.baselines[branch.id]
            risen = f"{_mean(baseline.losses):.4g} without it at tick {baseline.tick} to {_mean(now):.4g} with it"
            self.transitions.move(branch.row, Stage.ROLLED_BACK, f"slow harm: the judge set's loss went from {risen}")

    def settle(self, tick: int) -> None:
        """Return the host where it is worse without the branches that have just gone than it was before their blending."""
        leaving, self.transitions.leaving = self.transitions.leaving, []
        for branch in (self.registry.branches[number] for number in leaving):
            baseline = self.baselines.pop(branch.id, None)
            if baseline is not None:
                self._settle(branch, baseline, tick)
        watched = self.registry.in_stage(*WATCHED)
        if watched is not self._settled:
            present = {branch.id for branch in watched}
            self.baselines = {number: kept for number, kept in self.baselines.items() if number in present}
            self._settled = watched
        if not self.baselines:
            self.calm, self.lowest = None, math.inf

    def begin(self, tick: int) -> None:
        """Keep the state of the host for branches whose blending begins with the next forward."""
        watched = self.registry.in_stage(*WATCHED)
        if watched is self._settled and len(watched) == len(self.baselines):
            return  # every branch has its baseline
        new = [branch for branch in watched if branch.id not in self.baselines]
        if not new:
            return
        kept = self._keep(tick) or self._youngest()
        losses = self._losses(new)
        if not self.baselines:
            self.lowest = self.signal.fast if math.isfinite(self.signal.fast) else math.inf
        for branch in new:
            self.baselines[branch.id] = Baseline(tick, losses, kept, _mean(losses), self.signal.fast)

    def heard(self, branches: list[Branch], off: list[Tensor], tick: int) -> None:
        """Keep the present host instead of a baseline where a look at the judge set has found it better without the branch."""
        kept: KeptHost | None = None
        for branch, losses in zip(branches, off, strict=True):
            baseline = self.baselines.get(branch.id)
            if baseline is not None and _mean(losses) < _mean(baseline.losses):
                kept = kept or self._keep(tick)
                if kept is not None:
                    self.baselines[branch.id] = Baseline(tick, losses, kept, baseline.began, baseline.fast, baseline.looks)

    # --- the gate before FOSSILIZED ---

    def improvement(self, branch: Branch, now: Tensor) -> float:
        """The fall of the mean judge loss since the branch's blending began; ``now`` are the losses with it on. NaN where it is not known.

        If that loss has risen, the fall of the average training loss instead: a host that overfits is not harmed by its branches.
        """
        baseline = self.baselines.get(branch.id)
        if baseline is None or baseline.losses.shape != now.shape:
            return math.nan
        judged, trained = baseline.began - _mean(now), baseline.fast - self.signal.noise() - self.signal.fast
        return trained if judged < 0.0 < trained else judged

    # --- finding the harmful branch ---

    def _suspicious(self, tick: int) -> bool:
        """Whether the training loss has risen from its lowest by more than its noise; a lowest one is kept as a calm state."""
        fast = self.signal.fast
        if math.isfinite(fast) and fast <= self.lowest:
            self.lowest, self.calm = fast, self._keep(tick) or self.calm
            return False
        return not (math.isfinite(fast) and fast - self.lowest <= self.signal.noise())

    def _harmed(self, baseline: Baseline, now: Tensor) -> bool:
        baseline.looks += 1
        return worse(now, baseline.losses, spent(self.significance, baseline.looks)) and self._unlearnt(baseline)

    def _unlearnt(self, baseline: Baseline) -> bool:
        """Whether the average training loss has not fallen since the host was kept by more than its noise.

        If it has, the rise of the judge set's loss is overfitting, which the host would also do alone.
        """
        before = math.nan if baseline.kept is None else baseline.kept.signal["fast"]
        return not self.signal.fast < before - self.signal.noise()

    def _blamed(self, harmful: list[Branch], now: Tensor) -> Branch:
        """Of several branches the one without which the loss is lowest; the youngest where switching off none of them lowers it."""
        if len(harmful) > 1:
            without = [_mean(self._losses([branch])) for branch in harmful]
            lowest = min((loss for loss in without if math.isfinite(loss)), default=math.inf)
            if lowest < _mean(now) or (lowest < math.inf and not math.isfinite(_mean(now))):
                return harmful[without.index(lowest)]
        return max(harmful, key=lambda branch: (self.baselines[branch.id].tick, branch.id))

    # --- going back ---

    def _settle(self, branch: Branch, baseline: Baseline, tick: int) -> None:
        gone = [branch] if branch.alive else []  # a culled one still fades
        if not baseline.losses.numel():  # nobody can judge: a rollback is taken at its word
            if branch.stage is Stage.ROLLED_BACK and baseline.kept is not None:
                self._restore(baseline.kept)
                self.returned(baseline.kept.snapshot.tick)
                self.on_return()
            return
        now = self._losses(gone)
        if not worse(now, baseline.losses, self.significance) or not self._is_why(branch, baseline, now):
            return
        best = self._best(baseline, now, gone, tick)
        if best is None:
            return
        self.transitions.drop(branch)
        self.registry.mark_changed(branch.site)
        self.signal.load(best.signal)
        self.returned(best.snapshot.tick)
        self.on_return()
        site = self.registry.sites[branch.site].name
        text = f"without branch {branch.id} the host is worse than it was before; back to the state of tick {best.snapshot.tick}"
        self.transitions.port.emit(Alert(tick=tick, level="warning", code="host_returned", text=text, site=site, seed=branch.seed))

    def _is_why(self, branch: Branch, baseline: Baseline, now: Tensor) -> bool:
        """Whether a branch that went may be the reason for which the host is worse than before, and not mere overfitting.

        A rolled-back branch always may. For a culled branch, which still fades, either its removal hurts, or the training loss has not
        fallen since; the judge set's loss alone also rises under overfitting.
        """
        if not branch.alive or worse(now, self._losses([]), self.significance):
            return True
        return self._unlearnt(baseline)

    def _best(self, baseline: Baseline, now: Tensor, gone: list[Branch], tick: int) -> KeptHost | None:
        """Of the present state (None), the calm one and the one kept with ``baseline`` that of lowest judge loss; it is put in place."""
        present = self._keep(tick)
        best, lowest = None, _mean(now) if present is not None and math.isfinite(_mean(now)) else math.inf
        calm = self.calm if self.calm is not None and self.calm.snapshot.tick > baseline.tick else None
        for kept in (calm, baseline.kept):
            if kept is None:
                continue
            self._restore(kept)
            loss = _mean(self._losses(gone))
            if loss < lowest:
                best, lowest = kept, loss
        if best is None and present is None:
            best = baseline.kept  # nothing can be measured, and the present state is not sound
        final = best or present
        if final is not None:
            self._restore(final)
        return best

    def returned(self, tick: int) -> None:
        """The host has returned to ``tick``: forget states that were kept later, and keep new ones."""
        self.baselines = {number: kept for number, kept in self.baselines.items() if kept.tick <= tick}
        self.calm, self.lowest = None, self.signal.fast if math.isfinite(self.signal.fast) else math.inf

    def _restore(self, kept: KeptHost) -> None:
        kept.snapshot.restore(self.registry.model, self.transitions.optimizer, self.registry)

    def _keep(self, tick: int) -> KeptHost | None:
        """The present state, or None where it is not sound."""
        taken = Snapshot(self.registry.model, self.transitions.optimizer, self.registry, tick)
        healthy = self.transitions.ranks.all_agree(f"the host kept at tick {tick}", taken.healthy)
        return KeptHost(taken, self.signal.state()) if healthy else None

    def _youngest(self) -> KeptHost | None:
        found = [(baseline.tick, number) for number, baseline in self.baselines.items() if baseline.kept is not None]
        return self.baselines[max(found)[1]].kept if found else self.calm

    def _losses(self, without: list[Branch]) -> Tensor:
        """Losses on the judge set with some branches off; none where there is no judge."""
        if self.judge is None:
            return torch.zeros(0)
        return self.judge.losses(without)

    # --- checkpoints ---

    def state(self) -> dict[str, Any]:
        """Everything, by reference; a state that several branches share is in it once."""
        states: dict[int, KeptHost] = {}
        for kept in (self.calm, *(baseline.kept for baseline in self.baselines.values())):
            if kept is not None:
                states.setdefault(id(kept), kept)
        place = {key: number for number, key in enumerate(states)}
        return {
            "states": [{"snapshot": Still(kept.snapshot.state()), "signal": dict(kept.signal)} for kept in states.values()],
            "calm": None if self.calm is None else place[id(self.calm)],
            "lowest": self.lowest,
            "sound": {
                str(number): {
                    "tick": one.tick,
                    "losses": one.losses,
                    "kept": None if one.kept is None else place[id(one.kept)],
                    "began": one.began,
                    "fast": one.fast,
                    "looks": one.looks,
                }
                for number, one in self.baselines.items()
            },
        }

    def load(self, state: dict[str, Any], device: torch.device) -> None:
        """Take over a saved state."""
        states = [KeptHost(Snapshot.from_state(saved["snapshot"], device), _floats(saved["signal"])) for saved in state["states"]]
        self.calm = None if state["calm"] is None else states[int(state["calm"])]
        self.lowest = float(state["lowest"])
        self.baselines = {}
        for number, one in state["sound"].items():
            kept = None if one["kept"] is None else states[int(one["kept"])]
            self.baselines[int(number)] = Baseline(
                int(one["tick"]), one["losses"], kept, float(one["began"]), float(one["fast"]), int(one["looks"])
            )


def _mean(losses: Tensor) -> float:
    return float(losses.mean()) if losses.numel() else math.nan


def _floats(values: dict[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in values.items()}
