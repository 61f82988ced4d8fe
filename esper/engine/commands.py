"""Commands from the bus: a trial over the table of seeds turns each into actions, which are carried out only if all are allowed."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from esper.engine.branch_replacement import Replacing
from esper.engine.judging.gatekeeper import Gatekeeper
from esper.engine.measurements import Measured
from esper.engine.signals import GraftingSignals
from esper.engine.transitions import Transaction, Transitions
from esper.errors import UserError
from esper.grafting import hand_over
from esper.lifecycle import GATES, Stage
from esper.lifecycle.machine import Trial
from esper.messages import (
    ApplyEach,
    ApplyTogether,
    Cancel,
    ChangeStrategy,
    Command,
    EmergencyStop,
    Germinate,
    PauseGrafting,
    Predicate,
    ReplaceBranch,
    ResumeGrafting,
    Selector,
    SetStage,
)
from esper.randomness import global_draws_kept
from esper.telemetry_columns import COLUMNS, Column

COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
}


class Refused(Exception):
    """A command that cannot be carried out; the reason in words."""


@dataclass(frozen=True)
class Action:
    """One change to one seed: ``kind`` is germinate, move, strategy, pause, replace, or withdraw, which ends a replacement."""

    kind: str
    row: int
    target: Stage = Stage.DORMANT
    blueprint: str = ""
    strategy: str = ""
    objective: str = ""
    paused: bool = False
    start: str = ""
    why: Mapping[str, Any] | None = None


NOTHING_MEASURED = Measured()
MOST = 1000
"""Commands in one batch: more of them would keep a tick's end waiting, and a message that carries them small."""


def _parts(command: ApplyTogether | ApplyEach) -> list[Command]:
    """The commands of a batch; Refused for none, which can only be a mistake, and for more than MOST."""
    parts = command.commands
    if not 1 <= len(parts) <= MOST:
        kind = type(command).__name__
        raise Refused(f"an {kind} has 1 to {MOST} commands in it, and this one has {len(parts)}: leave it out, or send several")
    return parts


def _without_own(part: Command, batch: Command) -> Command:
    """A part of a batch, which comes and ends with the whole; Refused where it asks for more."""
    kind = type(batch).__name__
    for name, none in (("deadline", -1), ("priority", 0)):
        if getattr(part, name) != none:
            raise Refused(
                f"the command '{part.id}' in an {kind} has a {name} of its own, but all of them come and end together:"
                f" give the {name} to the {kind}"
            )
    return part


class Executor:
    """Applies one command at a time at a tick boundary: all of it or nothing, but for an ApplyEach, whose parts are on their own."""

    def __init__(
        self,
        transitions: Transitions,
        gates: Gatekeeper,
        signals: GraftingSignals,
        replacing: Replacing,
        rows_of: Callable[[int], list[float]],
    ) -> None:
        self.transitions = transitions
        self.gates = gates
        self.signals = signals
        self.replacing = replacing
        self.registry = transitions.registry
        self.rows_of = rows_of
        self.refusals: dict[str, int] = {}

    def apply(self, command: Command, tick: int, measured: Measured = NOTHING_MEASURED) -> tuple[str, str]:
        """(``applied`` | ``refused``, reason). A port hands out no command whose deadline is over.

        A strategy that takes over a branch sees the measurements of this tick.
        """
        try:
            with global_draws_kept():  # a blueprint of the user's may draw its start values from there
                if isinstance(command, ApplyEach):
                    return self._each(command, tick, measured)
                self._one(command, tick, measured)
        except Refused as refused:
            return "refused", self._counted(refused)
        return "applied", ""

    def _one(self, command: Command, tick: int, measured: Measured) -> None:
        actions = self._actions_of(command, self.transitions.machine.trial(), tick)
        self._do_all(actions, command.id, measured, isinstance(command, ApplyTogether) and command.as_one)

    def _each(self, batch: ApplyEach, tick: int, measured: Measured) -> tuple[str, str]:
        """Apply every command of a batch on its own; the status of the whole, and the reason of each refusal."""
        parts, refusals = _parts(batch), []
        for part in parts:
            try:
                self._one(_without_own(part, batch), tick, measured)
            except Refused as refused:
                refusals.append(f"'{part.id}': {self._counted(refused)}")
        if not refusals:
            return "applied", ""
        said = f"{len(refusals)} of {len(parts)} were refused: {'; '.join(refusals)}"
        return ("refused" if len(refusals) == len(parts) else "applied"), said

    def _counted(self, refused: Refused) -> str:
        """The reason of a refusal, counted for the summary."""
        reason = str(refused)
        self.refusals[reason] = self.refusals.get(reason, 0) + 1
        return reason

    def state(self) -> dict[str, int]:
        """The refusals, for a checkpoint."""
        return dict(self.refusals)

    def load(self, state: dict[str, int]) -> None:
        """Take over a saved state."""
        self.refusals = dict(state)

    def _do_all(self, actions: list[Action], command: str, measured: Measured, as_one: bool) -> None:
        """Every action or none: after an exception all of them are undone. A UserError is a refusal.

        ``as_one``: what germinates is one decision.
        """
        transaction = Transaction(self.transitions, [action.row for action in actions])
        try:
            with self.transitions.together():
                for action in actions:
                    self._do(action, f"command {command}", measured)
                grown = [self.registry.branch_at(action.row) for action in actions if as_one and action.kind == "germinate"]
                for branch in filter(None, grown):
                    branch.group = next(one.id for one in grown if one is not None)
        except BaseException as error:
            transaction.restore()
            if isinstance(error, UserError):
                raise Refused(str(error)) from error
            raise

    # --- working out ---

    def _actions_of(self, command: Command, trial: Trial, tick: int) -> list[Action]:
        match command:
            case Germinate():
                return [self._germinate(command, trial)]
            case ApplyTogether():
                actions = [action for part in _parts(command) for action in self._actions_of(_without_own(part, command), trial, tick)]
                return self._as_one(actions) if command.as_one else actions
            case EmergencyStop():
                return self._stop(command, trial)
            case SetStage():
                return [
                    self._move(row, self._stage(command.target), trial, tick) for row in self._whole(self._select(command.select, trial))
                ]
            case Cancel():
                return [self._cancel(row, trial, tick) for row in self._whole(self._select(command.select, trial))]
            case ReplaceBranch():
                return [self._replace(command, trial)]
            case ChangeStrategy():
                if command.strategy not in self.transitions.strategies:
                    raise Refused(f"there is no grafting strategy '{command.strategy}'; there are {', '.join(self.transitions.strategies)}")
                rows = self._grafting(command.select, trial, (Stage.GERMINATED, Stage.TRAINING, Stage.GRAFTING))
                return [Action("strategy", row, strategy=command.strategy) for row in rows]
            case PauseGrafting() | ResumeGrafting():
                rows = self._grafting(command.select, trial, (Stage.GRAFTING,))
                return [Action("pause", row, paused=isinstance(command, PauseGrafting)) for row in rows]
        raise Refused(f"the trainer knows no command {type(command).__name__}")

    def _germinate(self, command: Germinate, trial: Trial) -> Action:
        row = self.registry.row(command.site, command.seed)
        if row is None:
            raise Refused(self._no_such_seed(command.site, command.seed))
        blueprint = command.blueprint or self.registry.default_blueprint
        reason = trial.refusal(row, Stage.GERMINATED) or self.registry.misfit(row, blueprint)
        reason = self._flagged(command.site) or reason
        if self.replacing.on(row) is not None:
            reason = "its branch is being replaced"
        if self.signals.loss.diverging:
            reason = "the training loss is not finite, so nothing germinates until it is again"
        if reason is None and command.strategy and command.strategy not in self.transitions.strategies:
            reason = f"there is no grafting strategy '{command.strategy}'; there are {', '.join(self.transitions.strategies)}"
        if reason is None and command.objective:
            reason = self.transitions.objective.refusal(command.objective, self.registry.blueprints[blueprint])
        if reason is not None:
            raise Refused(reason)
        trial.apply(row, Stage.GERMINATED, "")
        return Action("germinate", row, blueprint=blueprint, strategy=command.strategy, objective=command.objective, why=command.why)

    def _as_one(self, actions: list[Action]) -> list[Action]:
        """The same actions; Refused where what germinates can be no one decision."""
        count, slots = sum(action.kind == "germinate" for action in actions), self.transitions.machine.training_slots
        if count == 0:
            raise Refused("as_one makes one decision of what germinates, and nothing here does: leave it out")
        if count > slots:
            raise Refused(
                f"{count} branches are to be one decision, but lifecycle.training_slots={slots} lets no more than that train at once"
            )
        return actions

    def _whole(self, rows: list[int]) -> list[int]:
        """These rows and those of the branches that are one decision with theirs."""
        branches = [branch for row in rows if (branch := self.registry.branch_at(row)) is not None and branch.group >= 0]
        return list(dict.fromkeys([*rows, *(member.row for branch in branches for member in self.registry.group_of(branch))]))

    def _flagged(self, site: str) -> str | None:
        """Why nothing may grow at a site, or None."""
        verdict = self.registry.flags.verdict("growth", site)
        return None if verdict.on else f"growth is off at '{site}': {verdict.why}"

    def _move(self, row: int, target: Stage, trial: Trial, tick: int) -> Action:
        if target is Stage.GERMINATED:
            raise Refused("a seed germinates by the command Germinate, which names blueprint and strategy")
        reason = trial.refusal(row, target)
        branch = self.registry.branch_at(row)
        source = trial.stage_of(row)
        gate = None if reason is not None else GATES.get((source, target))
        if gate is not None and (branch is None or branch.stage is not source or not self.gates.ask(branch, target, tick)):
            reason = f"the gate '{gate}' before {target.name} is not open"
        if reason is not None:
            raise Refused(reason)
        trial.apply(row, target, "")
        return Action("move", row, target=target)

    def _cancel(self, row: int, trial: Trial, tick: int) -> Action:
        """Cancel the replacement under way at a seed, or else its branch."""
        return Action("withdraw", row) if self.replacing.on(row) else self._move(row, Stage.CANCELLED, trial, tick)

    def _replace(self, command: ReplaceBranch, trial: Trial) -> Action:
        row = self.registry.row(command.site, command.seed)
        if row is None:
            raise Refused(self._no_such_seed(command.site, command.seed))
        reason = self.replacing.refusal(row, command.blueprint, command.start)
        if trial.stage_of(row) is not Stage.FOSSILIZED:
            reason = f"the seed is {trial.stage_of(row).name}, and only a FOSSILIZED one's branch is replaced in place"
        reason = self._flagged(command.site) or reason
        if reason is not None:
            raise Refused(reason)
        return Action("replace", row, blueprint=command.blueprint, start=command.start)

    def _stop(self, command: EmergencyStop, trial: Trial) -> list[Action]:
        """All that is under way at the selected seeds; where that is nothing, there is nothing to stop."""
        away = {
            Stage.GERMINATED: Stage.CANCELLED,
            Stage.TRAINING: Stage.CANCELLED,
            Stage.GRAFTING: Stage.CULLED,
            Stage.STABILIZATION: Stage.ROLLED_BACK,
            Stage.EVALUATING: Stage.CULLED,
            Stage.FINE_TUNING: Stage.CULLED,
        }
        chosen = set(self._whole(self._matching(command.select, trial)))
        rows = [row for row in trial.rows_in(*away) if row in chosen]
        trials = [Action("withdraw", branch.row) for branch in self.replacing.trials() if branch.row in chosen]
        return [Action("move", row, target=away[trial.stage_of(row)], why=command.why) for row in rows] + trials

    def _select(self, select: Selector, trial: Trial) -> list[int]:
        rows = self._matching(select, trial)
        if not rows:
            raise Refused("no seed meets the selection")
        return rows

    def _matching(self, select: Selector, trial: Trial) -> list[int]:
        sites = [n for n, site in enumerate(self.registry.sites) if site.name == select.site or fnmatchcase(site.name, select.site)]
        if not sites:
            names = ", ".join(site.name for site in self.registry.sites)
            raise Refused(f"no site matches '{select.site}'; there are {names}")
        rows = []
        for number in sites:
            count = self.registry.sites[number].geometry.seeds
            wanted = range(count) if select.seeds is None else select.seeds
            for seed in wanted:
                if not 0 <= seed < count:
                    raise Refused(self._no_such_seed(self.registry.sites[number].name, seed))
                rows.append(self.registry.first_row[number] + seed)
        if select.stage is not None:
            there = set(trial.rows_in(Stage(select.stage))) if select.stage in list(Stage) else set()
            rows = [row for row in rows if row in there]
        return [row for row in rows if all(self._holds(predicate, row) for predicate in select.where)]

    def _holds(self, predicate: Predicate, row: int) -> bool:
        if predicate.column not in COLUMNS or predicate.op not in COMPARISONS:
            raise Refused(f"'{predicate.column} {predicate.op}' is no predicate; columns: {', '.join(COLUMNS)}; {' '.join(COMPARISONS)}")
        return COMPARISONS[predicate.op](self.rows_of(row)[Column[predicate.column.upper()]], predicate.value)

    def _grafting(self, select: Selector, trial: Trial, stages: tuple[Stage, ...]) -> list[int]:
        rows = self._select(select, trial)
        for row in rows:
            if trial.stage_of(row) not in stages:
                names = " or ".join(stage.name for stage in stages)
                raise Refused(f"seed row {row} is {trial.stage_of(row).name}; this command needs {names}")
        return rows

    def _stage(self, number: int) -> Stage:
        if number not in list(Stage):
            raise Refused(f"there is no stage {number}; stages are 0 to {len(Stage) - 1}")
        return Stage(number)

    def _no_such_seed(self, site: str, seed: int) -> str:
        if site not in self.registry.by_name:
            return f"there is no site '{site}'; there are {', '.join(self.registry.by_name)}"
        count = self.registry.sites[self.registry.by_name[site]].geometry.seeds
        return f"site '{site}' has seeds 0 to {count - 1}, not {seed}"

    # --- doing ---

    def _do(self, action: Action, cause: str, measured: Measured) -> None:
        table, branch = self.registry.table, self.registry.branch_at(action.row)
        if action.kind == "germinate":
            self.transitions.germinate(action.row, action.blueprint, action.strategy, cause, action.objective, action.why)
        elif action.kind == "move":
            if table.stage_of(action.row) is not action.target:  # else it has just gone with another one
                self.transitions.move(action.row, action.target, cause, action.why)
        elif action.kind == "replace":
            self.replacing.begin(action.row, action.blueprint, action.start, cause)
        elif action.kind == "withdraw":
            successor = self.replacing.on(action.row)
            if successor is not None:  # an earlier part of the same command may have ended it
                self.replacing.end(successor, cause)
        elif action.kind == "pause":
            table.paused[action.row] = action.paused
        else:
            assert action.kind == "strategy" and branch is not None
            branch.strategy = action.strategy
            self.registry.mark_changed(branch.site)
            if branch.stage is Stage.GRAFTING:
                self._hand_over(branch.id, measured)

    def _hand_over(self, branch: int, measured: Measured) -> None:
        branches = self.registry.branches
        context = self.signals.context([branches[branch]], measured)
        rows = context.paused | True
        branches.grafting[branch] = hand_over(branches.grafting[[branch]], rows, context)[0]
