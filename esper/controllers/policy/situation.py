"""What the policy sees of a run: the run, its sites, its seeds and its branches under way as numbers between -1 and 1.

A run and a record of one are watched by the same class, so the policy learns from what it will see.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from esper.controllers.bookkeeping import Budget
from esper.controllers.credit import Credit, Ended, Life
from esper.controllers.health import Health
from esper.controllers.places import Places
from esper.controllers.senses import DIGITS, SEED_FEATURES, SITE_FEATURES, Senses
from esper.controllers.view import ACTIVE, LOST, Seed
from esper.lifecycle.stages import Stage
from esper.messages import Message, RunStarted, Telemetry, Transition

RUN = ("progress", "under way", "kept", "lost", "grown", "fall", "above best", "paid")
SITE = (*SITE_FEATURES, "near zero above others", "under way here", "kept here", "lost here", "paid here")
SEED = SEED_FEATURES
BRANCH = (*(f"stage={Stage(stage).name}" for stage in ACTIVE), "age", "blending", "alpha", "gain", "judged", "fall", "cost", "paid here")
FEATURES = {"run": RUN, "site": SITE, "seed": SEED, "branch": BRANCH}
LOOKS_BACK = 3
"""Values of the validation loss from which its fall is told."""
REWARD_SCALE = 5.0
"""Rewards and gains are shares of the loss; so many times larger they fill the range of the other features."""


@dataclass(frozen=True)
class Situation:
    """The state of a run at one decision, float32: ``run`` ``[R]``, ``site`` ``[S, F]``, ``seed`` ``[N, 3]``, ``branch`` ``[B, G]``.

    ``free`` bool ``[N]`` are the seeds that may germinate, ``first`` ``[S + 1]`` is where each site's seeds begin, ``branches`` name those
    under way.
    """

    run: np.ndarray
    site: np.ndarray
    seed: np.ndarray
    free: np.ndarray
    first: np.ndarray
    branches: list[Seed]
    branch: np.ndarray

    def seeds_of(self, site: int) -> slice:
        """The rows of a site's seeds."""
        return slice(int(self.first[site]), int(self.first[site + 1]))

    def open_sites(self) -> np.ndarray:
        """Sites of which some seed may germinate, bool ``[S]``."""
        return np.logical_or.reduceat(self.free, self.first[:-1]) if len(self.free) else np.zeros(0, bool)


class Watcher:
    """Hears the messages of a run, and tells its situation; ``credit`` pays each life that ends as the bandit's does."""

    def __init__(self, loss: str, rent: float, trend: float) -> None:
        self.places, self.health, self.senses = Places(), Health(), Senses()
        self.credit = Credit(loss, rent, trend)
        self.budget = Budget("", 0, 0.0)
        self.total = 1
        self._host = 1
        self._ends: dict[str, list[float]] = {}
        """Of each site: branches kept, branches lost, and the sum of their rewards."""

    def observe(self, message: Message) -> Ended | None:
        """Take note of a message; returns the life that ended by it."""
        self.places.observe(message)
        self.budget.observe(message)
        ended = self.credit.observe(message)
        if isinstance(message, RunStarted):
            self.total = max(1, message.total_ticks)
            self._host = max([1, *(site.get("host_parameters", 0) for site in message.sites)])
            self.senses.begin(message.sites)
        elif isinstance(message, Telemetry):
            self.health.observe(message)
            self.senses.hear(message)
        elif isinstance(message, Transition) and ended is not None:
            entry = self._ends.setdefault(message.site, [0.0, 0.0, 0.0])
            entry[message.target in LOST] += 1.0
            entry[2] += ended.reward
        return ended

    def look(self) -> None:
        """Gather the features that depend on telemetry, which several decisions at one tick share."""
        self.senses.look(self.health, self.places)
        near = self.senses.site[:, SITE_FEATURES.index("site near zero")]
        self._site = np.column_stack([self.senses.site, near - (near.mean() if len(near) else 0.0)])

    def situation(self, tick: int, free: np.ndarray, asked: Mapping[Seed, str] | None = None, leaving: Sequence[Seed] = ()) -> Situation:
        """The situation at ``tick``, after ``look``.

        ``free`` bool ``[N]`` are the seeds that may germinate; those in ``asked`` were told to, with these blueprints, and those in
        ``leaving`` to go, but neither has happened yet.
        """
        asked = asked or {}
        names = self.places.names
        active = [*(seed for seed in sorted(self.places.active) if seed not in leaving), *asked]
        ends = np.array([self._ends.get(name, (0.0, 0.0, 0.0)) for name in names]).reshape(-1, 3)
        here = dict.fromkeys(names, 0)
        for name, _ in active:
            here[name] += 1
        paid = _paid(ends[:, 2], ends[:, 0] + ends[:, 1])
        counts = np.column_stack([_filling(np.array([here[name] for name in names], float)), _filling(ends[:, 0]), _filling(ends[:, 1])])
        site = np.column_stack([self._site, counts, paid])
        living = [(seed, life) for seed, life in self.credit.lives.items() if seed in self.places.active and seed not in leaving]
        branch = [self._branch(seed, life, tick, float(paid[names.index(seed[0])])) for seed, life in living]
        return Situation(
            run=_rounded(self._run(tick, len(active), ends, sum(self.budget.cost(site, name) for (site, _), name in asked.items()))),
            site=_rounded(site),
            seed=self.senses.seed.astype(np.float32),
            free=free,
            first=self.places.first,
            branches=[seed for seed, _ in living],
            branch=_rounded(np.array(branch).reshape(-1, len(BRANCH))),
        )

    def _run(self, tick: int, active: int, ends: np.ndarray, more: int) -> np.ndarray:
        values = [value for _, value in self.credit.learning.values]
        kept, lost, rewards = ends.sum(0)
        fall = above = 0.0
        if len(values) >= 2:
            before, now, best = values[-min(len(values), LOOKS_BACK)], values[-1], min(values)
            size = max(abs(best), 1e-12)
            fall, above = float(np.clip((before - now) / size, -1.0, 1.0)), float(np.clip((now - best) / size, 0.0, 1.0))
        grown = (self.budget.used + more) / (self.budget.used + more + self._host)
        many = _filling(np.array([active, kept, lost], float))
        paid = _paid(np.array([rewards]), np.array([kept + lost]))
        return np.array([tick / self.total, *many, grown, fall, above, *paid])

    def _branch(self, seed: Seed, life: Life, tick: int, paid: float) -> list[float]:
        stage = int(self.places.stage[self.places.row(seed)])
        loss = self.credit.learning.last()
        size = abs(loss) if np.isfinite(loss) and loss != 0.0 else 1.0
        ages = [min(1.0, 2.0 * max(0, tick - since) / self.total) if since >= 0 else 0.0 for since in (life.born, life.blending)]
        worth = [REWARD_SCALE * value / size if np.isfinite(value) else 0.0 for value in (life.gain, life.fall)]
        gain, fall = np.clip(worth, -1.0, 1.0).tolist()
        cost = self.credit.cost(life.site, life.blueprint)
        judged = float(np.isfinite(life.gain))
        return [*(float(stage == one) for one in ACTIVE), *ages, life.alpha, gain, judged, fall, cost / (1.0 + cost), paid]

    def state(self) -> dict[str, Any]:
        """JSON-able."""
        parts = {name: getattr(self, name).state() for name in _PARTS}
        return parts | {"ends": {name: list(entry) for name, entry in self._ends.items()}}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from ``state``."""
        for name in _PARTS:
            getattr(self, name).load_state(state[name])
        self._ends = {name: [float(value) for value in entry] for name, entry in state["ends"].items()}


_PARTS = ("places", "health", "senses", "credit", "budget")


def _filling(counts: np.ndarray) -> np.ndarray:
    """``n / (n + 2)``: every further one counts less."""
    return np.asarray(counts / (counts + 2.0))


def _paid(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Mean rewards, scaled and within ±1; 0 of none."""
    return np.asarray(np.clip(REWARD_SCALE * sums / np.maximum(counts, 1.0), -1.0, 1.0))


def _rounded(values: np.ndarray) -> np.ndarray:
    return np.asarray(values.round(DIGITS), np.float32)
