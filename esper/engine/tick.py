"""One tick of the lifecycle: fades and ramps, failures, gates, timeouts, and seeds waiting for a training slot."""

from __future__ import annotations

import torch

from esper.engine.exceptions import Faults
from esper.engine.judging.gatekeeper import Gatekeeper
from esper.engine.judging.guard import Guard
from esper.engine.signals import LossSignal, WeightAverages
from esper.engine.transitions import Transitions
from esper.grafting import STRATEGY_NAMES, GraftingContext, signals_of, step_many
from esper.grafting.base import MAX_ERROR_RATE
from esper.grafting.custom import CustomStrategy
from esper.lifecycle import Ages, LifecycleConfig, Stage
from esper.lifecycle.transitions import BLENDED
from esper.messages import Alert
from esper.seeds import Branch, SeedRegistry

FORWARD: dict[Stage, Stage] = {
    Stage.TRAINING: Stage.GRAFTING,
    Stage.GRAFTING: Stage.STABILIZATION,
    Stage.STABILIZATION: Stage.EVALUATING,
    Stage.EVALUATING: Stage.FINE_TUNING,
    Stage.FINE_TUNING: Stage.FOSSILIZED,
}

GAVE_UP = "gave up: a signal or its own wish is not finite"
NAMED = 8
"""Branches that an alert names; of more it says how many."""


class Advance:
    """Applies the age table and the gates; everything happens at the tick boundary, in the order of the rows."""

    def __init__(
        self,
        config: LifecycleConfig,
        ages: Ages,
        registry: SeedRegistry,
        transitions: Transitions,
        gates: Gatekeeper,
        guard: Guard,
        loss: LossSignal,
        faults: Faults,
    ) -> None:
        self.config = config
        self.ages = ages
        self.registry = registry
        self.transitions = transitions
        self.gates = gates
        self.guard = guard
        self.loss = loss
        self.faults = faults
        self.weights = WeightAverages()
        self.metric: float | None = None
        self.gradient_norms: dict[int, float] = {}
        self.counterfactual: dict[int, float] = {}
        self.error_rates: dict[int, float] = {}
        self.trouble: dict[int, str] = {}

    def begin(self) -> None:
        """What comes first at a tick: every seed is one tick older, fades and ramps go on."""
        self.transitions.machine.advance()
        ramped = set() if self.loss.diverging else self._ramp()
        self.registry.set_alphas(self.transitions.fade(self.ages.fade) | ramped)

    def finish(self, tick: int) -> None:
        """What comes after the commands: failing and harmful seeds go, gates open, ages run out, waiting seeds get their slots."""
        self._remove_failing()
        self.guard.watch(tick)
        self.guard.settle(tick)
        self._open_gates(tick)
        self._end_outlived()
        self.guard.settle(tick)
        self.guard.begin(tick)
        self._promote()
        self.metric = None
        self.counterfactual = {}

    # --- alpha ---

    def _ramp(self) -> set[int]:
        """Step the strategies of all GRAFTING branches; marks those that abort. Returns the sites whose alphas changed."""
        branches = self.registry.in_stage(Stage.GRAFTING)
        if not branches:
            self.weights.averages.clear()
            return set()
        table = self.registry.branches
        ids = [branch.id for branch in branches]
        index = torch.tensor([STRATEGY_NAMES.index(branch.strategy) for branch in branches])
        out = step_many(index, self.transitions.strategies, table.grafting[ids], self.context(branches))
        self._note_raised(branches)
        table.alpha[ids] = out.alpha
        table.grafting[ids] = out.state
        gone = [branch for branch, abort in zip(branches, out.abort.tolist(), strict=True) if abort]
        for branch in gone:
            self.trouble.setdefault(branch.id, f"grafting strategy {branch.strategy} {GAVE_UP}")
        self.say_given_up([branch for branch in gone if self.error_rates.get(branch.id, 0.0) <= MAX_ERROR_RATE])
        return {branch.site for branch in branches}

    def _note_raised(self, branches: list[Branch]) -> None:
        """Count an exception of a rule of the user's on the branches that it blends."""
        for name, config in self.transitions.strategies.items():
            if isinstance(config, CustomStrategy) and config.error is not None:
                error, config.error = config.error, None
                blended = [branch for branch in branches if branch.strategy == name]
                rule = f"grafting rule {type(config.rule).__name__}"
                self.trouble |= self.faults.note(dict.fromkeys((branch.id for branch in blended), error), self.transitions.tick, rule)

    def say_given_up(self, branches: list[Branch]) -> None:
        """One alert a strategy that gave these up though they themselves did not fail."""
        for strategy in sorted({branch.strategy for branch in branches}):
            mine = [branch for branch in branches if branch.strategy == strategy]
            names = [f"branch {branch.id} of seed {branch.seed} at {self.registry.sites[branch.site].name}" for branch in mine[:NAMED]]
            more = f" and {len(mine) - NAMED} more" if len(mine) > NAMED else ""
            text = f"grafting strategy {strategy} {GAVE_UP}; to CULLED: {', '.join(names)}{more}"
            one = len(mine) == 1
            site, seed = (self.registry.sites[mine[0].site].name, mine[0].seed) if one else ("", -1)
            self.transitions.port.emit(
                Alert(tick=self.transitions.tick, level="error", code="strategy_gave_up", text=text, site=site, seed=seed)
            )

    def context(self, branches: list[Branch]) -> GraftingContext:
        """The signals of these branches at this tick."""
        n = len(branches)
        configs = [self.transitions.strategies[branch.strategy] for branch in branches]
        rows = [branch.row for branch in branches]
        asks_drift = [b for b in branches if "drift" in signals_of(self.transitions.strategies[b.strategy])]
        drift = torch.zeros(n)
        if asks_drift:
            values = self.weights.drift(self.registry, asks_drift)
            drift[[branches.index(branch) for branch in asks_drift]] = values
        known = torch.full((n,), self.metric is not None)
        counterfactual = [self.counterfactual.get(branch.id) for branch in branches]
        return GraftingContext(
            ramp=torch.full((n,), float(max(1, self.ages.ramp))),
            alpha_min=torch.tensor([config.alpha_min for config in configs]),
            alpha_max=torch.tensor([config.alpha_max for config in configs]),
            paused=self.registry.table.paused[rows],
            metric=torch.full((n,), 0.0 if self.metric is None else self.metric),
            metric_known=known,
            loss=torch.full((n,), self.loss.fast),
            loss_variance=torch.full((n,), self.loss.variance),
            grad_norm=torch.tensor([self.gradient_norms.get(branch.id, 0.0) for branch in branches]),
            drift=drift,
            counterfactual=torch.tensor([0.0 if value is None else value for value in counterfactual]),
            counterfactual_known=torch.tensor([value is not None for value in counterfactual]),
            error_rate=torch.tensor([self.error_rates.get(branch.id, 0.0) for branch in branches]),
        )

    # --- leaving a stage ---

    def _remove_failing(self) -> None:
        for branch in self.registry.branches.living():
            rate = self.error_rates.get(branch.id, 0.0)
            cause = self.trouble.pop(branch.id, None)
            if cause is None and not rate <= self.config.error_rate:
                cause = f"{rate:.0%} of its forwards were not finite"
            if cause is None or branch.stage in (Stage.GERMINATED, Stage.FOSSILIZED, Stage.CULLED):
                continue
            target = Stage.ROLLED_BACK if branch.stage is Stage.STABILIZATION else Stage.CULLED
            self.registry.table.errors[branch.row] += 1
            self.transitions.move(branch.row, target, cause)

    def _open_gates(self, tick: int) -> None:
        table = self.registry.table
        due = [b for b in self.registry.in_stage(*FORWARD) if int(table.age[b.row]) >= self.ages.minimum[b.stage]]
        looking = [b for b in due if b.stage in (Stage.EVALUATING, Stage.FINE_TUNING)]
        for branch in due:
            if branch not in looking and self.gates.ask(branch, FORWARD[branch.stage], tick):
                self.transitions.move(branch.row, FORWARD[branch.stage], "gate passed")
        looking = [b for b in looking if int(table.age[b.row]) >= int(table.next_look[b.row])]
        for branch, passed in zip(looking, self.gates.look(looking, tick), strict=True):
            if passed:
                self.transitions.move(branch.row, FORWARD[branch.stage], f"gain {branch.gain:.4g}, bound {branch.bound:.4g}")
            elif branch.id in self.gates.diverged:
                self.transitions.move(branch.row, Stage.ROLLED_BACK, "judged: the loss is not finite")
            else:
                table.next_look[branch.row] = table.age[branch.row] + self.ages.judge_every

    def _end_outlived(self) -> None:
        for row, target in self.transitions.machine.outlived():
            source = self.registry.table.stage_of(row)
            gone = source in BLENDED or source in (Stage.GERMINATED, Stage.TRAINING)
            cause = f"{source.name} reached its maximum age" if gone else "rest is over"
            self.transitions.move(row, target, cause)

    def _promote(self) -> None:
        """GERMINATED seeds to TRAINING, oldest branch first, while there are slots."""
        for branch in [] if self.loss.diverging else self.registry.in_stage(Stage.GERMINATED):
            if self.transitions.machine.refusal(branch.row, Stage.TRAINING) is None:
                self.transitions.move(branch.row, Stage.TRAINING, "a training slot is free")
