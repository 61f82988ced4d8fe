"""Transitions and their effects: on a branch's parameters, on its alpha, and on the host."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from esper.engine.learning.objectives import Objective
from esper.engine.port import Port
from esper.grafting import CONFIGS as STRATEGY_CONFIGS
from esper.grafting import GraftingConfig
from esper.grafting.state import initial_state
from esper.lifecycle import Machine, Stage
from esper.lifecycle.history import Passed, shortened
from esper.lifecycle.table import RESTING
from esper.lifecycle.transitions import BLENDED
from esper.messages import Message, Transition
from esper.seeds import Branch, SeedRegistry


class Transitions:
    """Moves seeds between stages: the machine decides whether, this class carries out the effects, and the port is told.

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

    def germinate(self, row: int, blueprint: str, strategy: str, cause: str) -> Branch:
        """DORMANT → GERMINATED with a new branch."""
        source = self.machine.apply(row, Stage.GERMINATED, cause).source
        branch = self.registry.germinate(row, blueprint or self.registry.default_blueprint, strategy or self.default_strategy)
        self._say(row, branch, source, Stage.GERMINATED, cause)
        self.counts["germinated"] += 1
        return branch

    def move(self, row: int, target: Stage, cause: str) -> None:
        """Any other transition; raises ValueError where the table of transitions has none."""
        branch = self.registry.branch_at(row)
        source = self.machine.table.stage_of(row)
        self.machine.apply(row, target, cause)
        if target in RESTING:
            self.machine.table.rest(row, self.tick)
        if branch is not None:
            self._carry_out(branch, source, target)
        self._say(row, branch, source, target, cause)

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
        self.registry.branches.alpha[branch.id] = config.alpha_min

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

    def _say(self, row: int, branch: Branch | None, source: Stage, target: Stage, cause: str) -> None:
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
        )
        self.say(event)
