"""Transitions and their effects on a branch, its alpha and the host; a transaction takes back those of a command that failed halfway."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from esper.blueprints import BlockBank, SlotBank
from esper.distributed import Ranks
from esper.engine.learning.inheritance import inherit
from esper.engine.learning.objectives import Objective
from esper.engine.port import Port
from esper.grafting import CONFIGS as STRATEGY_CONFIGS
from esper.grafting import GraftingConfig
from esper.grafting.state import initial_state
from esper.lifecycle import Machine, Stage
from esper.lifecycle.history import Passed, shortened
from esper.lifecycle.table import RESTING
from esper.lifecycle.transitions import BLENDED, exits
from esper.messages import Message, Transition
from esper.seeds import Branch, SeedRegistry

LEAVING_FIRST = (Stage.CANCELLED, Stage.CULLED, Stage.ROLLED_BACK)
"""Stages of branches that go, in the order in which they are preferred where a branch goes with another one."""
LEAVING = frozenset(LEAVING_FIRST)


class Transitions:
    """Moves seeds between stages: the machine decides whether, and this class carries out the effects and informs the port.

    ``leaving`` are the blended branches that have been culled or rolled back at this tick: the guard decides whether the host returns.
    """

    def __init__(
        self,
        registry: SeedRegistry,
        machine: Machine,
        grafting: GraftingConfig,
        objective: Objective,
        port: Port,
        optimizer: torch.optim.Optimizer | None,
    ) -> None:
        self.registry = registry
        self.machine = machine
        self.strategies: dict[str, GraftingConfig] = {name: config() for name, config in STRATEGY_CONFIGS.items()}
        self.strategies[grafting.name] = grafting
        self.default_strategy = grafting.name
        self.objective = objective
        self.port = port
        self.optimizer = optimizer
        self.leaving: list[int] = []
        self.prepare: Callable[[Branch], None] = lambda branch: None
        """Called for every new branch, for start values that depend on the host's weights or gradients."""
        self.ranks = Ranks.alone()
        self.tick = 0
        self._later: list[Callable[[], None]] | None = None
        self.counts = {"germinated": 0, "fossilized": 0, "culled": 0, "cancelled": 0, "rolled_back": 0}

    @contextmanager
    def together(self) -> Iterator[None]:
        """Within: messages wait until all of it has succeeded; after an exception they do not happen."""
        assert self._later is None, "one command at a time"
        later = self._later = []
        try:
            yield
        finally:
            self._later = None
        for action in later:
            action()

    def say(self, event: Message) -> None:
        """Tell the port; of a command's doings, once all of them have succeeded."""
        self._at_last(lambda: self.port.emit(event))

    def _at_last(self, action: Callable[[], None]) -> None:
        if self._later is None:
            action()
        else:
            self._later.append(action)

    def germinate(
        self, row: int, blueprint: str, strategy: str, cause: str, objective: str = "", why: Mapping[str, Any] | None = None
    ) -> Branch:
        """DORMANT → GERMINATED with a new branch; ``why`` is the controller's explanation, which the event repeats."""
        source = self.machine.apply(row, Stage.GERMINATED, cause).source
        branch = self.registry.germinate(row, blueprint or self.registry.default_blueprint, strategy or self.default_strategy)
        bank = self.registry.layers[branch.site].bank(branch.blueprint)
        if isinstance(bank, BlockBank):
            inherit(bank, branch.slot, self.optimizer)
        branch.objective = objective
        self.prepare(branch)
        if isinstance(bank, SlotBank):  # a block is copied from the host, which is the same on every rank
            self.ranks.from_rank([stack.detach()[branch.slot] for stack in bank.stacks.values()], self.ranks.size - 1)
        self._say(row, branch, source, Stage.GERMINATED, cause, why)
        self.counts["germinated"] += 1
        return branch

    def move(self, row: int, target: Stage, cause: str, why: Mapping[str, Any] | None = None) -> None:
        """Any other transition; raises ValueError where the table of transitions has none.

        What is one decision with a branch that goes goes with it. ``why`` is the controller's explanation, which the event repeats.
        """
        branch = self.registry.branch_at(row)
        self._move(row, target, cause, why)
        if branch is None or branch.group < 0 or target not in LEAVING:
            return
        for other in self.registry.group_of(branch):
            if other.stage not in (*LEAVING, Stage.FOSSILIZED):
                possible = exits(other.stage) & LEAVING
                away = target if target in possible else min(possible, key=LEAVING_FIRST.index)
                self._move(other.row, away, f"goes with branch {branch.id}: {cause}")

    def _move(self, row: int, target: Stage, cause: str, why: Mapping[str, Any] | None = None) -> None:
        branch = self.registry.branch_at(row)
        source = self.machine.table.stage_of(row)
        self.machine.apply(row, target, cause)
        if target in RESTING:
            self.machine.table.rest(row, self.tick)
        if branch is not None:
            self._carry_out(branch, source, target)
        self._say(row, branch, source, target, cause, why)

    def _carry_out(self, branch: Branch, source: Stage, target: Stage) -> None:
        branch.stage = target
        alphas = self.registry.branches.alpha
        if source is Stage.TRAINING:
            self.objective.forget(branch.id)
        if source in BLENDED and target in (Stage.CULLED, Stage.ROLLED_BACK):
            self.leaving.append(branch.id)
        if target is Stage.GRAFTING:
            self._begin_grafting(branch)
        elif target is Stage.CULLED:
            self.registry.branches.fade_from[branch.id] = alphas[branch.id]
            if source not in BLENDED or not self.sound(branch) or float(alphas[branch.id]) == 0.0:
                self.drop(branch)
        elif target in (Stage.CANCELLED, Stage.ROLLED_BACK):
            self.drop(branch)
        name = target.name.lower()
        if name in self.counts:
            self.counts[name] += 1
        self.registry.mark_changed(branch.site)

    def _begin_grafting(self, branch: Branch) -> None:
        config = self.strategies[branch.strategy]
        self.registry.branches.grafting[branch.id] = initial_state(1)[0]
        at_once = self.machine.ages.ramp == 0
        self.registry.branches.alpha[branch.id] = config.alpha_max if at_once else config.alpha_min

    def drop(self, branch: Branch) -> None:
        """Alpha to zero and the parameters freed, at once."""
        self.registry.branches.alpha[branch.id] = 0.0
        if branch.alive:
            self.registry.release(branch)

    def sound(self, branch: Branch) -> bool:
        """Whether the branch failed in none of this tick's forwards."""
        return int(self.machine.table.errors[branch.row]) == 0

    def fade(self, fade_ticks: int) -> set[int]:
        """Lower the alphas of culled branches; frees those that are gone. Returns the sites whose alphas changed."""
        sites: set[int] = set()
        for branch in self.registry.in_stage(Stage.CULLED):
            age = int(self.machine.table.age[branch.row])
            left = 0.0 if fade_ticks == 0 else max(0.0, 1.0 - age / fade_ticks)
            alpha = float(self.registry.branches.fade_from[branch.id]) * left
            self.registry.branches.alpha[branch.id] = alpha
            sites.add(branch.site)
            if alpha == 0.0:
                self.drop(branch)
        return sites

    def state(self) -> dict[str, int]:
        """The counts of transitions, for a checkpoint."""
        return dict(self.counts)

    def load(self, state: dict[str, int]) -> None:
        """Take over a saved state."""
        self.counts = {name: int(state[name]) for name in self.counts}

    def _say(self, row: int, branch: Branch | None, source: Stage, target: Stage, cause: str, why: Mapping[str, Any] | None = None) -> None:
        registry = self.registry
        site, seed = registry.sites[registry.site_of(row)].name, registry.seed_of(row)
        if branch is not None:
            branch.path.append((target.name, self.tick))
        registry.history.note(row, Passed(self.tick, source, target, -1 if branch is None else branch.id, shortened(cause)))
        event = Transition(
            tick=self.tick,
            site=site,
            seed=seed,
            branch=-1 if branch is None else branch.id,
            source=int(source),
            target=int(target),
            cause=cause,
            generation=int(registry.table.generation[row]),
            blueprint="" if branch is None else branch.blueprint,
            strategy="" if branch is None else branch.strategy,
            objective="" if branch is None else self.objective.kind_of(branch),
            why=dict(why or {}),
        )
        self.say(event)


@dataclass(frozen=True)
class _Mutable:
    stage: Any
    alive: bool
    path: int
    gain: float
    bound: float
    strategy: str
    replaces: int
    held: bool
    looks: int

    @classmethod
    def of(cls, branch: Branch) -> _Mutable:
        values = {name: getattr(branch, name) for name in cls.__dataclass_fields__}
        return cls(**values | {"path": len(branch.path)})

    def put_back(self, branch: Branch) -> None:
        for name in self.__dataclass_fields__.keys() - {"path"}:
            setattr(branch, name, getattr(self, name))
        del branch.path[self.path :]


class Transaction:
    """The state of seeds and branches before a command, which ``restore`` puts back.

    Slots are freed and hosts returned only after the command, so they need no copy. ``rows`` are the seeds that the command moves;
    nothing of the others changes.
    """

    def __init__(self, transitions: Transitions, rows: list[int]) -> None:
        registry = transitions.registry
        self.transitions = transitions
        self._rows = torch.tensor(sorted(set(rows)), dtype=torch.int64)
        self._table = {name: column[self._rows] for name, column in registry.table.columns.items()}
        self._history = registry.history.copy(rows)
        self._branches = [_Mutable.of(branch) for branch in registry.branches.entries]
        self._numbers = {name: getattr(registry.branches, name).clone() for name in ("alpha", "fade_from", "grafting")}
        self._slots = [_slots(registry, number) for number in range(len(registry.sites))]
        self._released = list(registry.released)
        self._counts, self._leaving = dict(transitions.counts), list(transitions.leaving)
        self._readiness, self._failed = dict(transitions.objective.readiness), set(transitions.objective.failed)

    def restore(self) -> None:
        """Put everything back, and free slots that were allocated since."""
        transitions, registry = self.transitions, self.transitions.registry
        for name, column in self._table.items():
            registry.table.columns[name][self._rows] = column
        del registry.branches.entries[len(self._branches) :]
        for branch, was in zip(registry.branches.entries, self._branches, strict=True):
            was.put_back(branch)
        registry.history.put_back(self._history)
        for name, value in self._numbers.items():
            setattr(registry.branches, name, value)
        for number, before in enumerate(self._slots):
            _free_new(registry, number, before)
            registry.mark_changed(number)
        registry.released = self._released
        transitions.counts, transitions.leaving = self._counts, self._leaving
        transitions.objective.readiness, transitions.objective.failed = self._readiness, self._failed


def _slots(registry: SeedRegistry, number: int) -> dict[str, set[int]]:
    return {name: _used(bank) for name, bank in registry.banks(number).items()}


def _used(bank: SlotBank | BlockBank) -> set[int]:
    if isinstance(bank, BlockBank):
        return {int(key) for key in bank.blocks}
    return {slot for slot, used in enumerate(bank.used) if used}


def _free_new(registry: SeedRegistry, number: int, before: dict[str, set[int]]) -> None:
    banks: nn.ModuleDict = registry.layers[number].banks
    for name, bank in registry.banks(number).items():
        if name not in before:
            del banks[name]
            continue
        for slot in _used(bank) - before[name]:
            bank.free(slot)
