"""The gates: measuring the value that each asks for, counting the answers, and sending every answer to the bus."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from esper.engine.judging.guard import Guard
from esper.engine.judging.judge import Gain, Judge
from esper.engine.learning.objectives import Objective
from esper.engine.port import Port
from esper.engine.signals import LossSignal
from esper.lifecycle import GATES, LifecycleConfig, Stage, passes, spent
from esper.messages import Alert, GateResult
from esper.seeds import Branch, SeedRegistry

GAINS = ("gain", "final_gain", "replacement")
"""Gates whose value is a gain's confidence bound."""


@dataclass
class GateCounts:
    """How often a gate was asked, how often it opened, and the value that came closest to the threshold."""

    threshold: float
    asked: int = 0
    passed: int = 0
    closest: float = float("nan")


class Gatekeeper:
    """Answers gates for the branches of a registry; a value that is missing or not finite opens none.

    ``ramp_end`` is the alpha at the end of each strategy's ramp, in float32. ``said`` holds the alerts that are given once a run.
    """

    def __init__(
        self,
        config: LifecycleConfig,
        registry: SeedRegistry,
        judge: Judge | None,
        objective: Objective,
        loss: LossSignal,
        guard: Guard,
        port: Port,
        ramp_end: Mapping[str, float],
    ) -> None:
        self.config = config
        self.registry = registry
        self.judge = judge
        self.objective = objective
        self.loss = loss
        self.guard = guard
        self.port = port
        self.ramp_end = ramp_end
        self.counts: dict[str, GateCounts] = {}
        self.diverged: set[int] = set()
        self.said: set[str] = set()

    def ask(self, branch: Branch, target: Stage, tick: int) -> bool:
        """Whether the gate before ``branch.stage → target`` is open now (transitions without one always are)."""
        gate = GATES.get((branch.stage, target))
        if gate is None:
            return True
        if self.loss.diverging:
            return False
        if gate in ("gain", "final_gain"):
            return self.look([branch], tick)[0]
        value, threshold = self._cheap(gate, branch)
        if gate == "stability" and not self.loss.heard and "no_training_loss" not in self.said:
            self.said.add("no_training_loss")
            text = (
                "no training loss was given, so the gate 'stability' stays shut: give it to grow.tick(loss) or after_backward(batch, loss)"
            )
            self.port.emit(Alert(tick=tick, level="error", code="no_training_loss", text=text))
            warnings.warn(f"esper: {text}", stacklevel=2)  # a loop of the user's own reads no alerts
        return self._answer(gate, branch, value, threshold, tick, 0)

    def look(self, branches: list[Branch], tick: int) -> list[bool]:
        """One look at the judge set for branches in EVALUATING or FINE_TUNING; each look spends error rate."""
        if self.judge is None or not branches or self.loss.diverging:
            return [False] * len(branches)
        table = self.registry.table
        errors = []
        for branch in branches:
            table.looks[branch.row] += 1
            errors.append(spent(self.config.significance, int(table.looks[branch.row])))
        gains = self.judge.look(branches, errors)
        self.guard.heard(branches, self.judge.off, tick)
        if self.judge.spoiled and "judge_not_finite" not in self.said:
            self.said.add("judge_not_finite")
            text = f"{self.judge.spoiled} losses on the judge set are not finite even without the branch, so no gate opens; check its data"
            self.port.emit(Alert(tick=tick, level="error", code="judge_not_finite", text=text))
        return [self._take(branch, gain, tick) for branch, gain in zip(branches, gains, strict=True)]

    def exchange(self, successor: Branch, predecessor: Branch, tick: int) -> bool:
        """Whether the judge finds a branch better in the place of another, by ``lifecycle.gain``; each look spends error rate."""
        if self.judge is None or self.loss.diverging:
            return False
        successor.looks += 1
        gain = self.judge.exchange(successor, predecessor, spent(self.config.significance, successor.looks))
        successor.gain, successor.bound = gain.mean, gain.bound
        return self._answer("replacement", successor, gain.bound, self.config.gain, tick, successor.looks)

    def say_diverging(self, tick: int) -> None:
        """An alert, once a run, that the training loss is not finite, with the consequences."""
        if not self.loss.diverging or "loss_not_finite" in self.said:
            return
        self.said.add("loss_not_finite")
        text = f"the training loss is not finite at tick {tick}; nothing germinates, learns or is blended further until it is again"
        self.port.emit(Alert(tick=tick, level="error", code="loss_not_finite", text=text))
        warnings.warn(f"esper: {text}", stacklevel=2)  # a loop of the user's own reads no alerts

    def _take(self, branch: Branch, gain: Gain, tick: int) -> bool:
        branch.gain, branch.bound = gain.mean, gain.bound
        self.diverged.discard(branch.id)
        if gain.samples and not math.isfinite(gain.mean):
            self.diverged.add(branch.id)
        self.registry.table.score[branch.row] = gain.mean
        gate = "gain" if branch.stage is Stage.EVALUATING else "final_gain"
        look = int(self.registry.table.looks[branch.row])
        passed = self._answer(gate, branch, gain.bound, self.config.gain, tick, look)
        if not passed or gate == "gain" or not self.config.guard:
            return passed
        assert self.judge is not None
        return self._answer("no_harm", branch, self.guard.improvement(branch, self.judge.on), 0.0, tick, look)

    def _cheap(self, gate: str, branch: Branch) -> tuple[float, float]:
        if gate == "readiness":
            return self.objective.readiness.get(branch.id, float("nan")), self.config.readiness
        if gate == "stability":
            return self.loss.steadiness(), self.config.stability
        assert gate == "ramp", gate
        return float(self.registry.branches.alpha[branch.id]), self.ramp_end[branch.strategy]

    def _answer(self, gate: str, branch: Branch, value: float, threshold: float, tick: int, look: int) -> bool:
        passed = passes(value, threshold) and (value > 0.0 or gate not in GAINS)  # 0 ≥ 0 is no gain
        counts = self.counts.setdefault(gate, GateCounts(threshold))
        counts.asked += 1
        counts.passed += passed
        if math.isfinite(value) and not value <= counts.closest:
            counts.closest = value
        site = self.registry.sites[branch.site].name
        asked = GateResult(
            tick=tick,
            site=site,
            seed=branch.seed,
            branch=branch.id,
            gate=gate,
            value=value,
            threshold=threshold,
            passed=passed,
            look=look,
        )
        self.port.emit(asked)
        return passed

    # --- checkpoints ---

    def state(self) -> dict[str, Any]:
        """The answers of every gate, and the alerts that have been given."""
        return {"gates": {name: asdict(counts) for name, counts in self.counts.items()}, "said": sorted(self.said)}

    def load(self, state: dict[str, Any]) -> None:
        """Take over a saved state. Others hold ``said`` too, so it stays the same set."""
        self.counts = {name: GateCounts(**counts) for name, counts in state["gates"].items()}
        self.said.clear()
        self.said.update(state["said"])
