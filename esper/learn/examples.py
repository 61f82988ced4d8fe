"""Decisions of a recorded run: in what situation what was done, and the reward that it earned.

The run is watched as a policy would watch it. A germination earns what the branch was worth for its cost at the end of its life
(``esper.controllers.credit``, as the bandit's do), and waiting earns nothing. Of a branch under way it is kept what it still earned from
then on, so that stopping can be weighed against going on.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from esper.controllers.bandit import LOSS
from esper.controllers.credit import Ended, Life
from esper.controllers.policy.network import GERMINATE, STOP, WAIT
from esper.controllers.policy.situation import Situation, Watcher
from esper.controllers.view import ACTIVE, LOST, Seed
from esper.learn.recorded import Tick
from esper.lifecycle.stages import Stage
from esper.messages import CONTROLLER, RunStarted, Transition

EVERY = 0.05
"""Time between two looks at which a run that did nothing is taken to have waited, as a share of the run."""
RENT, TREND = 0.02, 0.5
"""Of the rewards: as the bandit's."""
_BY_COMMAND = f"command {CONTROLLER}-"


@dataclass(eq=False)
class Example:
    """One decision: its situation, the kind of action, and what was chosen; ``rest`` ``[B]`` is what every branch still earned.

    ``seeds`` ``[n, 3]`` and ``seed_may`` ``[n]`` are those of the chosen site, and ``seed`` is the chosen one's number. ``reward`` and
    ``rest`` are NaN as long as, or where, they are not known.
    """

    situation: Situation
    open: np.ndarray
    blueprints: list[frozenset[str]]
    kind: int = WAIT
    site: int = -1
    seeds: np.ndarray = field(default_factory=lambda: np.zeros((1, 3), np.float32))
    seed_may: np.ndarray = field(default_factory=lambda: np.ones(1, bool))
    seed: int = 0
    words: tuple[str, str, str] = ("", "", "")
    branch: int = -1
    reward: float = 0.0
    rest: np.ndarray = field(default_factory=lambda: np.zeros(0))


_Key = tuple[str, int, int]  # site, seed and the tick of its germination


class Replay:
    """Watches a recorded run, and gathers its decisions in ``examples``."""

    def __init__(self, begun: RunStarted) -> None:
        self.watcher = Watcher(LOSS, RENT, TREND)
        self.watcher.observe(begun)
        self.examples: list[Example] = []
        self._total = max(1, begun.total_ticks)
        self._every = max(1, round(EVERY * self._total))
        self._blueprints = [frozenset(site["blueprints"]) for site in begun.sites]
        self._grown: dict[_Key, list[Example]] = {}
        self._living: dict[_Key, list[tuple[Example, int, float]]] = {}
        self._heard = False
        self._last = 0

    def of(self, ticks: Iterable[Tick]) -> list[Example]:
        """All decisions of these ticks, which are the whole of a run."""
        for tick, events, telemetry in ticks:
            for look in range(self._last - self._last % self._every + self._every, tick, self._every):
                self._wait(look)  # nothing happened there, not even telemetry
            acts = [event for event in events if isinstance(event, Transition) and self._is_act(event)]
            if acts and self._heard:
                self.watcher.look()
            for event in [*acts, *(event for event in events if event not in acts)]:  # decided before the last tick's metrics were known
                if event in acts and self._heard:
                    self._act(event, tick - 1)
                ended = self.watcher.observe(event)
                if ended is not None:
                    self._end(ended)
            for message in telemetry:
                self.watcher.observe(message)
                self._heard = True
            if (acts or tick % self._every == 0) and tick < self._total:
                self._wait(tick)
            self._last = tick
        for ended in self.watcher.credit.unfinished(self._last):
            self._end(ended)
        return self.examples

    @staticmethod
    def _is_act(event: Transition) -> bool:
        """Whether a controller asked for this transition: a germination, or the end of a branch under way."""
        ends = event.target in LOST and event.source in ACTIVE
        return event.cause.startswith(_BY_COMMAND) and (event.target == Stage.GERMINATED or ends)

    def _seen(self, tick: int) -> Example:
        """The situation at ``tick``, before anything is done; what its branches will still earn is filled in when they end."""
        watcher = self.watcher
        situation = watcher.situation(tick, watcher.places.free([]) & watcher.senses.known)
        made = Example(situation, situation.open_sites(), self._blueprints, rest=np.full(len(situation.branches), math.nan))
        for row, seed in enumerate(situation.branches):
            life = watcher.credit.lives[seed]
            paid = (life.squat + max(0, tick - life.since) * (1.0 - life.alpha)) / self._total
            self._living.setdefault(_key(life), []).append((made, row, RENT * paid))
        return made

    def _wait(self, tick: int) -> None:
        if self._heard:
            self.watcher.look()
            self._keep(self._seen(tick))

    def _act(self, event: Transition, tick: int) -> None:
        made, seed = self._seen(tick), (event.site, event.seed)
        if event.target == Stage.GERMINATED:
            self._germinate(made, event, seed)
        elif seed in made.situation.branches:
            made.kind, made.branch, made.reward = STOP, made.situation.branches.index(seed), math.nan
            self._living.pop(_key(self.watcher.credit.lives[seed]), None)  # nobody knows what it would have earned
            self._keep(made)

    def _germinate(self, made: Example, event: Transition, seed: Seed) -> None:
        places, row = self.watcher.places, self.watcher.places.row(seed)
        site = places.names.index(event.site)
        if not made.situation.free[row]:
            return  # without sound telemetry nothing was seen of it, and a policy would not have been let
        span = made.situation.seeds_of(site)
        made.kind, made.site, made.seed = GERMINATE, site, seed[1]
        made.seeds, made.seed_may = made.situation.seed[span], made.situation.free[span]
        made.words, made.reward = (event.blueprint, event.strategy, event.objective), math.nan
        self._grown.setdefault((event.site, event.seed, event.tick), []).append(made)
        self._keep(made)

    def _keep(self, made: Example) -> None:
        """Remember a decision, without the seeds that were not chosen from: they may be a hundred thousand."""
        none = np.zeros((0, 3), np.float32)
        thin = Situation(made.situation.run, made.situation.site, none, none[:, 0] > 0, made.situation.first, [], made.situation.branch)
        made.situation = thin
        self.examples.append(made)

    def _end(self, ended: Ended) -> None:
        key = _key(ended.life)
        for example in self._grown.pop(key, []):
            example.reward = ended.reward
        for example, row, paid in self._living.pop(key, []):
            example.rest[row] = ended.reward + paid


def _key(life: Life) -> _Key:
    return life.site, life.seed, life.born
