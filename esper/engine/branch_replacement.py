"""Replacing a kept branch in place: another learns in its place, is tried, and stays only if the judge finds it better, twice.

The successor first learns in shadow forwards, in which it has the place of the present branch; the live forward is not affected. If the
judge finds it better by ``lifecycle.gain``, it takes the place, frozen, and the present branch is held unchanged. A rollback therefore
restores parameters, moments, α and stage to the bit. After ``lifecycle.evaluating_min`` the judge compares both again, and only then
the earlier branch is culled.
"""

from __future__ import annotations

import torch

from esper.engine.judging.gatekeeper import Gatekeeper
from esper.engine.measurements import Measured
from esper.engine.snapshot import branch_state, restore_branch
from esper.engine.transitions import Transitions
from esper.errors import UserError
from esper.lifecycle import Ages, LifecycleConfig, Stage
from esper.lifecycle.history import Passed, shortened
from esper.messages import Alert
from esper.seeds import Branch

STARTS = ("fresh", "copy")


class Replacing:
    """The trials under way. Their whole state is in the branches, so a resumed run continues in the middle of them."""

    def __init__(self, config: LifecycleConfig, ages: Ages, transitions: Transitions, gates: Gatekeeper) -> None:
        self.config = config
        self.ages = ages
        self.transitions = transitions
        self.registry = transitions.registry
        self.gates = gates

    def trials(self) -> list[Branch]:
        """Branches that learn, or are tried, in the place of another."""
        return [b for b in self.registry.branches.living() if b.replaces >= 0 and self.registry.branches[b.replaces].alive]

    def on(self, row: int) -> Branch | None:
        """The trial at a seed, if there is one."""
        return next((branch for branch in self.trials() if branch.row == row), None)

    def refusal(self, row: int, blueprint: str, start: str) -> str | None:
        """Why the branch of this FOSSILIZED seed cannot be replaced now, or None. An empty ``blueprint`` is its own."""
        branch = self.registry.branch_at(row)
        if branch is None or not branch.alive or branch.stage is not Stage.FOSSILIZED:
            return "only a FOSSILIZED branch is replaced in place; others are culled, and their seeds germinate anew"
        if self.on(row) is not None:
            return f"branch {branch.id} is being replaced already"
        if start not in STARTS:
            return f"start={start} is not accepted; a branch that replaces another starts {' or '.join(STARTS)}"
        if start == "copy" and blueprint not in ("", branch.blueprint):
            return f"a copy of branch {branch.id} is of its blueprint {branch.blueprint}; leave the blueprint out, or say start=fresh"
        if self.gates.judge is None:
            return "there is no judge set, so nothing could decide which branch is better"
        if self.config.objective != "shadow":
            return f"a branch learns in another's place by lifecycle.objective=shadow alone, and this run's is {self.config.objective}"
        if self.gates.loss.diverging:
            return "the training loss is not finite, so nothing is replaced until it is again"
        if len(self.registry.in_stage(Stage.TRAINING)) >= self.config.training_slots:
            return f"all {self.config.training_slots} training slots are taken"
        return self.registry.misfit(row, blueprint or branch.blueprint)

    def begin(self, row: int, blueprint: str, start: str, cause: str) -> Branch:
        """Let another branch learn in the place of this seed's. Raises UserError where ``refusal`` says why not."""
        reason = self.refusal(row, blueprint, start)
        if reason is not None:
            raise UserError(reason)
        predecessor = self.registry.branch_at(row)
        assert predecessor is not None
        successor = self.registry.germinate_successor(predecessor, blueprint or predecessor.blueprint)
        if start == "copy":
            with torch.no_grad():
                restore_branch(self.registry, successor.id, branch_state(self.registry, predecessor.id))
        successor.path.append((Stage.GERMINATED.name, self.transitions.tick))
        self._enter(successor, Stage.TRAINING)
        self._say(successor, "begun", f"learns in the place of branch {predecessor.id} ({cause})")
        return successor

    def watch(self, tick: int, measured: Measured) -> None:
        """Once a tick: end failing trials, judge those that are due, and end those whose time is up."""
        for branch in self.trials():
            error_rate = measured.error_rates.get(branch.id, 0.0)
            cause = measured.trouble.get(branch.id)
            if cause is None and not error_rate <= self.config.error_rate:
                cause = f"{error_rate:.0%} of its forwards were not finite"
            if cause is not None:
                self.end(branch, cause)
                continue
            learning = branch.stage is Stage.TRAINING
            stage = Stage.TRAINING if learning else Stage.EVALUATING
            age, least, most = tick - branch.path[-1][1], self.ages.minimum[stage], self.ages.maximum[stage]
            due = age >= least and ((age - least) % self.ages.judge_every == 0 or age >= most)
            if due and self.gates.exchange(branch, self.registry.branches[branch.replaces], tick):
                (self._put_in if learning else self._keep)(branch)
            elif age >= most:
                self.end(branch, f"gain {branch.gain:.4g}, bound {branch.bound:.4g} over branch {branch.replaces} in {age} ticks")

    def end(self, branch: Branch, cause: str) -> None:
        """End a trial: the earlier branch returns to its place unchanged."""
        predecessor = self.registry.branches[branch.replaces]
        if predecessor.held:
            predecessor.held = False
            self._own(predecessor, f"branch {branch.id} rolled back: {cause}")
        self.transitions.objective.forget(branch.id)
        self._enter(branch, Stage.ROLLED_BACK)
        self.transitions.drop(branch)
        self._say(branch, "rolled_back", f"is rolled back, and branch {predecessor.id} is in its place as it was: {cause}")

    def _put_in(self, branch: Branch) -> None:
        """Give the branch the place, on trial; the other is held."""
        predecessor = self.registry.branches[branch.replaces]
        predecessor.held = True
        self.registry.branches.alpha[branch.id] = self.registry.branches.alpha[predecessor.id]
        self.transitions.objective.forget(branch.id)
        self._enter(branch, Stage.FOSSILIZED)
        self._own(branch, f"in the place of branch {predecessor.id}, on trial")
        self._say(branch, "on_trial", f"takes the place of branch {predecessor.id} on trial: {self._worth(branch)}")

    def _keep(self, branch: Branch) -> None:
        """The trial is passed: the earlier branch is culled."""
        predecessor = self.registry.branches[branch.replaces]
        predecessor.held = False
        self._enter(predecessor, Stage.CULLED)
        self.transitions.drop(predecessor)
        self._say(branch, "kept", f"has replaced branch {predecessor.id}: {self._worth(branch)}")

    def _own(self, branch: Branch, cause: str) -> None:
        self.registry.table.branch[branch.row] = branch.id
        passed = Passed(self.transitions.tick, Stage.FOSSILIZED, Stage.FOSSILIZED, branch.id, shortened(cause))
        self.registry.history.note(branch.row, passed)

    def _enter(self, branch: Branch, stage: Stage) -> None:
        branch.stage = stage
        branch.path.append((stage.name, self.transitions.tick))
        self.registry.mark_changed(branch.site)

    def _worth(self, branch: Branch) -> str:
        return f"gain {branch.gain:.4g} over it, bound {branch.bound:.4g}"

    def _say(self, branch: Branch, code: str, what: str) -> None:
        site = self.registry.sites[branch.site].name
        text = f"branch {branch.id} ({branch.blueprint}) of seed {branch.seed} at {site} {what}"
        self.transitions.say(
            Alert(tick=self.transitions.tick, level="info", code=f"replacement_{code}", text=text, site=site, seed=branch.seed)
        )
