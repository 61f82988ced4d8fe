"""A tick of the lifecycle: measure, ramp, obey, judge, age, tell."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from esper.engine.agreement import Agreement
from esper.engine.branch_replacement import Replacing
from esper.engine.commands import Executor
from esper.engine.costs import Stopwatch
from esper.engine.judging.gatekeeper import Gatekeeper
from esper.engine.judging.guard import Guard
from esper.engine.learning.new_units import NewUnits
from esper.engine.measurements import Faults, Measured, Measurements
from esper.engine.signals import GraftingSignals
from esper.engine.telemetry import Observer
from esper.engine.transitions import LEAVING, Transitions
from esper.engine.untying import Untying
from esper.grafting import step_many
from esper.grafting.base import MAX_ERROR_RATE
from esper.grafting.custom import CustomStrategy
from esper.lifecycle import Ages, LifecycleConfig, Stage
from esper.lifecycle.transitions import BLENDED, exits
from esper.messages import Alert, Command, Report, RequestReport
from esper.seeds import Branch

FORWARD: dict[Stage, Stage] = {
    Stage.TRAINING: Stage.GRAFTING,
    Stage.GRAFTING: Stage.STABILIZATION,
    Stage.STABILIZATION: Stage.EVALUATING,
    Stage.EVALUATING: Stage.FINE_TUNING,
    Stage.FINE_TUNING: Stage.FOSSILIZED,
}

JUDGED = (Stage.EVALUATING, Stage.FINE_TUNING)
"""Stages whose gate is a look at the judge set."""
GAVE_UP = "gave up: a signal or its own wish is not finite"
NAMED = 8
"""Branches that an alert names; of more it says how many."""


class TickBoundary:
    """Everything that happens at the end of a tick. Seeds are moved here and nowhere else, except by the governor's rollback."""

    def __init__(
        self,
        config: LifecycleConfig,
        ages: Ages,
        transitions: Transitions,
        gates: Gatekeeper,
        guard: Guard,
        measurements: Measurements,
        signals: GraftingSignals,
        executor: Executor,
        observer: Observer,
        faults: Faults,
        replacing: Replacing,
        clock: Stopwatch,
        agreement: Agreement,
    ) -> None:
        self.config = config
        self.ages = ages
        self.transitions = transitions
        self.registry = transitions.registry
        self.machine = transitions.machine
        self.port = transitions.port
        self.gates = gates
        self.guard = guard
        self.measurements = measurements
        self.signals = signals
        self.executor = executor
        self.observer = observer
        self.faults = faults
        self.replacing = replacing
        transitions.prepare = NewUnits(measurements).prepare
        self.untying = Untying(transitions, ages.untie)
        self.clock = clock
        self.agreement = agreement
        self._candidates: tuple[list[Branch], Tensor, Tensor] = [], torch.zeros(0), torch.zeros(0)  # branches, rows, minimum ages

    def run(self, tick: int) -> None:
        """One tick, from the measurements of the step before it to the news for the controller."""
        self.transitions.tick = tick
        self.gates.say_diverging(tick)
        measured, commands = self.measurements.take(tick, self.port.commands(tick))
        measured = self.ramp(tick, measured)
        with self.clock.timing("judge"):
            for command in commands:
                self.obey(command, tick, measured)
            self.judge(tick, measured)
            self.age(tick)
        self.tell(tick)

    # --- ramp ---

    def ramp(self, tick: int, measured: Measured) -> Measured:
        """Make every seed one tick older, let the alphas of GRAFTING branches climb, and those of CULLED ones fade.

        Returns the measurements, with the branches that their strategy gave up among those in trouble.
        """
        self.machine.advance()
        blended = [] if self.signals.loss.diverging else self.registry.in_stage(Stage.GRAFTING)
        if blended:
            measured = self._step_strategies(blended, tick, measured)
        elif not self.signals.loss.diverging:
            self.signals.weights.averages.clear()
        faded = self.transitions.fade(self.ages.fade)
        self.registry.set_alphas(faded | {branch.site for branch in blended})
        return measured

    def _step_strategies(self, branches: list[Branch], tick: int, measured: Measured) -> Measured:
        table = self.registry.branches
        ids, index = self.signals.ids_and_strategies(branches)
        context = self.signals.context(branches, measured)
        if self.signals.weights.averages:
            self.signals.weights.keep(branch.id for branch in branches if self.signals.asks(branch, "drift"))
        out = step_many(index, self.transitions.strategies, table.grafting[ids], context)
        trouble = {**measured.trouble, **self._raised_by_rules(branches, tick)}
        alpha, state, abort = self.agreement.of_first(f"alphas at tick {tick}", [out.alpha, out.state, out.abort])
        table.alpha[ids] = alpha
        table.grafting[ids] = state
        gone = [branches[place] for place in abort.nonzero().flatten().tolist()]
        for branch in gone:
            trouble.setdefault(branch.id, f"grafting strategy {branch.strategy} {GAVE_UP}")
        self.say_given_up([branch for branch in gone if measured.error_rates.get(branch.id, 0.0) <= MAX_ERROR_RATE], tick)
        return dataclasses.replace(measured, trouble=trouble)

    def _raised_by_rules(self, branches: list[Branch], tick: int) -> dict[int, str]:
        """Count an exception of the user's own rule on the branches that it blends; returns those that must go for repeating it."""
        trouble: dict[int, str] = {}
        for name, config in self.transitions.strategies.items():
            if isinstance(config, CustomStrategy) and config.error is not None:
                error, config.error = config.error, None
                raised = dict.fromkeys((branch.id for branch in branches if branch.strategy == name), error)
                trouble |= self.faults.note(raised, tick, f"grafting rule {type(config.rule).__name__}")
        return trouble

    def say_given_up(self, branches: list[Branch], tick: int) -> None:
        """One alert for each strategy that gave up branches which did not themselves fail."""
        for strategy in sorted({branch.strategy for branch in branches}):
            mine = [branch for branch in branches if branch.strategy == strategy]
            names = [f"branch {branch.id} of seed {branch.seed} at {self.registry.sites[branch.site].name}" for branch in mine[:NAMED]]
            more = f" and {len(mine) - NAMED} more" if len(mine) > NAMED else ""
            text = f"grafting strategy {strategy} {GAVE_UP}; to CULLED: {', '.join(names)}{more}"
            site, seed = (self.registry.sites[mine[0].site].name, mine[0].seed) if len(mine) == 1 else ("", -1)
            self.port.emit(Alert(tick=tick, level="error", code="strategy_gave_up", text=text, site=site, seed=seed))

    # --- obey ---

    def obey(self, command: Command, tick: int, measured: Measured) -> None:
        """Carry out one command and acknowledge it."""
        if isinstance(command, RequestReport):
            stages, branches, seeds = self.registry.table.counts(), self.observer.branch_cards(), self.observer.seed_cards()
            self.port.emit(Report(tick=tick, command_id=command.id, stages=stages, branches=branches, seeds=seeds))
            self.port.acknowledge(command.id, "applied", "", tick)
            return
        status, reason = self.executor.apply(command, tick, measured)
        self.port.acknowledge(command.id, status, reason, tick)

    # --- judge ---

    def judge(self, tick: int, measured: Measured) -> None:
        """Remove failing and harmful branches, open gates for the others, and judge the trials of replacements."""
        self._remove_failing(tick, measured)
        self.guard.watch(tick)
        self.guard.settle(tick)
        self._open_gates(tick)
        self.replacing.watch(tick, measured)

    def _remove_failing(self, tick: int, measured: Measured) -> None:
        failing = {branch for branch, share in measured.error_rates.items() if not share <= self.config.error_rate}
        suspects = failing | measured.trouble.keys()
        living = [branch for branch in self.registry.branches.living() if branch.id in suspects] if suspects else []
        for branch in [branch for branch in living if branch.replaces < 0 or not branch.excluded]:
            error_rate = measured.error_rates.get(branch.id, 0.0)
            cause = measured.trouble.get(branch.id)
            if cause is None and not error_rate <= self.config.error_rate:
                cause = f"{error_rate:.0%} of its forwards were not finite"
            if cause is None or branch.stage in (Stage.GERMINATED, Stage.FOSSILIZED, *LEAVING):
                continue
            target = Stage.ROLLED_BACK if branch.stage is Stage.STABILIZATION else Stage.CULLED
            self.registry.table.errors[branch.row] += 1
            self.transitions.move(branch.row, target, cause)
            self._count_failure(branch, tick)

    def _count_failure(self, branch: Branch, tick: int) -> None:
        """Stop growth at a site where branches fail repeatedly, if the flag says so."""
        site = self.registry.sites[branch.site].name
        if self.registry.flags.fail("growth", site):
            text = f"nothing grows at {site} from here on: {self.registry.flags.verdict('growth', site).why}"
            self.port.emit(Alert(tick=tick, level="warning", code="growth_off", text=text, site=site))

    def _open_gates(self, tick: int) -> None:
        table = self.registry.table
        due = self._due()
        looking = [unit for unit in due if unit[0].stage in JUDGED]
        for unit in due:
            target = FORWARD[unit[0].stage]
            if unit[0].stage not in JUDGED and all(self.gates.ask(branch, target, tick) for branch in unit):
                self._forward(unit, "gate passed")
        looking = [unit for unit in looking if all(int(table.age[b.row]) >= int(table.next_look[b.row]) for b in unit)]
        for unit, passed in zip(looking, self.gates.look([unit[0] for unit in looking], tick), strict=True):
            branch = unit[0]
            for other in unit[1:]:
                other.gain, other.bound, table.score[other.row] = branch.gain, branch.bound, table.score[branch.row]
            if passed:
                self._forward(unit, f"gain {branch.gain:.4g}, bound {branch.bound:.4g}")
            elif branch.id in self.gates.diverged:
                self.transitions.move(branch.row, Stage.ROLLED_BACK, "judged: the loss is not finite")
            else:
                for member in unit:
                    table.next_look[member.row] = table.age[member.row] + self.ages.judge_every

    def _due(self) -> list[list[Branch]]:
        """Branches that are old enough for their gate, each alone or with all that are one decision with it, which must be as far."""
        candidates = self.registry.in_stage(*FORWARD)
        if candidates is not self._candidates[0]:
            seeds = torch.tensor([branch.row for branch in candidates], dtype=torch.int64)
            least = torch.tensor([self.ages.minimum[branch.stage] for branch in candidates], dtype=torch.int64)
            self._candidates = candidates, seeds, least
        _, seeds, least = self._candidates
        old = (self.registry.table.age[seeds] >= least).nonzero().flatten().tolist() if candidates else []
        due = [branch for branch in (candidates[place] for place in old) if not branch.excluded]
        known = {branch.id for branch in due if branch.group >= 0}
        units = [self.registry.group_of(branch) for branch in due if branch.group in (-1, branch.id)]
        return [unit for unit in units if len(unit) == 1 or all(b.id in known and b.stage is unit[0].stage for b in unit)]

    def _forward(self, unit: list[Branch], cause: str) -> None:
        target = FORWARD[unit[0].stage]
        for branch in unit:
            self.transitions.move(branch.row, target, cause)

    # --- age ---

    def age(self, tick: int) -> None:
        """Move seeds out of outlived stages, let the guard keep the host for new blendings, and give waiting seeds training slots."""
        self._end_outlived()
        self.untying.run(tick)
        self.guard.settle(tick)
        self.guard.begin(tick)
        self._promote()

    def _end_outlived(self) -> None:
        for row, target in self.machine.outlived():
            source = self.registry.table.stage_of(row)
            if target not in exits(source):
                continue  # it has just gone with another one
            gone = source in BLENDED or source in (Stage.GERMINATED, Stage.TRAINING)
            cause = f"{source.name} reached its maximum age" if gone else "rest is over"
            self.transitions.move(row, target, cause)

    def _promote(self) -> None:
        """Move GERMINATED seeds to TRAINING, oldest branch first, while there are slots."""
        for branch in [] if self.signals.loss.diverging else self.registry.in_stage(Stage.GERMINATED):
            group = self.registry.group_of(branch)
            taken = len(self.machine.rows_in(Stage.TRAINING))
            if branch is group[0] and taken + len(group) <= self.machine.training_slots:
                if any(self.machine.refusal(member.row, Stage.TRAINING) is not None for member in group):
                    continue
                for member in group:
                    self.transitions.move(member.row, Stage.TRAINING, "a training slot is free")

    # --- tell ---

    def tell(self, tick: int) -> None:
        """Update the groups for the new stages, publish telemetry where it is due, and end the tick on the port."""
        self.registry.refresh()
        if self.observer.due:
            self.observer.publish(tick)
        self.port.end_tick(tick)
