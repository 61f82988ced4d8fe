"""What a bandit may choose: seeds, blueprints, strategies and objectives, as features of a linear model that scores all of them at once.

The expected reward is a sum of parts: of the seed (its health), of its site, of the arm (blueprint, strategy and objective, the blueprint
also times the run's progress), and of the run. So one draw of the weights scores ``N`` seeds at ``S`` sites and ``K`` arms in
``O(N + S·K)``.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

from esper.controllers.health import Health
from esper.controllers.places import Places
from esper.controllers.posterior import Posterior
from esper.controllers.senses import DIGITS, SEED_FEATURES, SITE_FEATURES, Senses
from esper.errors import UserError
from esper.messages import Telemetry

SMALL = ("affine", "low_rank", "mlp", "glu", "conv")
"""Blueprints that may grow beside each other at a site."""
STRATEGIES = ("linear", "drift", "momentum", "grad_norm")
OBJECTIVES = ("shadow", "functional_gradient")
OWN_NAMES = 32
"""Sites that have a feature of their own; of more, neighbours share one."""


@dataclass(frozen=True)
class Found:
    """The best of all choices: positions of the seed, the site and the arm, and the reward that a draw promises."""

    row: int
    site: int
    arm: int
    value: float


class Arms:
    """The choices of one run; ``look`` gathers their features, ``best`` scores them."""

    def __init__(self, blueprints: list[str], strategies: list[str], objectives: list[str]) -> None:
        self._wanted = blueprints, strategies, objectives
        self.names: list[str] = []
        self.senses = Senses()
        self.arms: list[tuple[str, str, str]] = []

    def begin(self, sites: list[dict[str, Any]]) -> None:
        """The run's sites. Raises UserError where nothing of what may germinate fits any of them."""
        wanted, strategies, objectives = self._wanted
        own = sites[0]["blueprint"]
        blueprints = wanted or (sorted({own, *SMALL}, key=[own, *SMALL].index) if own in SMALL else [own])
        fitting = [name for name in blueprints if any(name in site["blueprints"] for site in sites)]
        if wanted and (unknown := [name for name in wanted if name not in fitting]):
            there = sorted({name for site in sites for name in site["blueprints"]})
            raise UserError(f"controller.blueprints names '{unknown[0]}', which fits no site; blueprints that do: {', '.join(there)}.")
        can = sites[0].get("objectives", [])
        if refused := [name for name in objectives if can and name not in can]:
            raise UserError(f"controller.objectives names '{refused[0]}', which cannot be in this run; {', '.join(can)} can.")
        learn_from = objectives or [name for name in OBJECTIVES if name in can] or can or [""]
        self.arms = list(product(fitting, strategies or STRATEGIES, learn_from))
        self.sites = [site["name"] for site in sites]
        count = len(sites)
        self.senses.begin(sites)
        shared = [self.sites[number - number % max(1, -(-count // OWN_NAMES))] for number in range(count)]
        self._identity = [f"site={name}" for name in shared]
        self._fits = np.array([[name in site["blueprints"] for name, _, _ in self.arms] for site in sites])
        costs = [[site["blueprints"].get(name, {"parameters": 0})["parameters"] for name, _, _ in self.arms] for site in sites]
        self._parameters = np.array(costs, float)
        chosen = [f"{key}={value}" for place, key in enumerate(("blueprint", "strategy", "objective")) for value in self._values(place)]
        later = [f"blueprint={value} × progress" for value in self._values(0)]
        self.names = ["bias", "progress", *SEED_FEATURES, *SITE_FEATURES, *dict.fromkeys(self._identity), *chosen, *later]

    def _values(self, place: int) -> list[str]:
        return list(dict.fromkeys(arm[place] for arm in self.arms))

    def hear(self, message: Telemetry) -> None:
        """Telemetry of a site."""
        self.senses.hear(message)

    def look(self, health: Health, places: Places, free: np.ndarray, progress: float) -> None:
        """Gather the present features of every seed and site; ``free`` are the seeds that may germinate, bool ``[seeds]``."""
        self.senses.look(health, places)
        self._seed, self._site, self._first = self.senses.seed, self.senses.site, self.senses.first
        self._free, self._progress = free & self.senses.known, round(progress, DIGITS)

    def take(self, row: int) -> None:
        """A seed that has been chosen may not be chosen again."""
        self._free[row] = False

    def affordable(self, parameters: float) -> np.ndarray:
        """Which arms fit where, bool ``[sites, arms]``, and cost at most so many parameters."""
        return self._fits & (self._parameters <= parameters)

    def best(self, posterior: Posterior, weights: np.ndarray, allowed: np.ndarray) -> Found | None:
        """The choice of the highest reward under these weights ``[d]``; None where nothing may be chosen."""
        seeds = np.where(self._free, self._seed @ weights[self._at(posterior, SEED_FEATURES)], -np.inf)
        best = np.maximum.reduceat(seeds, self._first)
        total = (best + self._of_sites(posterior, weights[None])[0])[:, None] + self._of_arms(posterior, weights[None])[0]
        total = np.where(allowed, total, -np.inf)
        site, arm = np.unravel_index(int(np.argmax(total)), total.shape)
        if not np.isfinite(total[site, arm]):
            return None
        span = slice(int(self._first[site]), int(self._first[site + 1]) if site + 1 < len(self._first) else len(seeds))
        row = span.start + int(np.argmax(seeds[span]))
        return Found(row, int(site), int(arm), float(total[site, arm]) + float(self._of_run(posterior, weights)))

    def chances(self, posterior: Posterior, draws: np.ndarray, allowed: np.ndarray, shown: int) -> dict[str, dict[str, float]]:
        """How often each value would be chosen over some draws ``[draws, d]`` of the weights, ``nothing`` included.

        Of each site the seed that is best by the posterior mean stands for all; of sites the ``shown`` likeliest are named.
        """
        mean = np.where(self._free, self._seed @ posterior.mean[self._at(posterior, SEED_FEATURES)], -np.inf)
        ends = [*self._first[1:].tolist(), len(mean)]
        rows = [begin + int(np.argmax(mean[begin:end])) for begin, end in zip(self._first.tolist(), ends, strict=True)]
        health = draws[:, self._at(posterior, SEED_FEATURES)] @ self._seed[rows].T
        sites = np.where(self._free[rows], health + self._of_sites(posterior, draws), -np.inf)
        total = np.where(allowed, sites[:, :, None] + self._of_arms(posterior, draws)[:, None, :], -np.inf).reshape(len(draws), -1)
        chosen = total.argmax(1)
        pays = total[np.arange(len(draws)), chosen] + self._of_run(posterior, draws) > 0.0
        site, arm = np.divmod(chosen, len(self.arms))
        share = 1.0 / len(draws)
        said: dict[str, dict[str, float]] = {key: {} for key in ("site", "blueprint", "strategy", "objective")}
        for which, what, worth in zip(site, arm, pays, strict=True):
            values = (self.sites[which], *self.arms[what]) if worth else ("nothing",) * 4
            for key, value in zip(said, values, strict=True):
                said[key][value] = said[key].get(value, 0.0) + share
        said["site"] = dict(sorted(said["site"].items(), key=lambda entry: (-entry[1], entry[0]))[:shown])
        return said

    def features(self, found: Found) -> dict[str, float]:
        """The features of a choice, by name; those that are zero are left out."""
        values = dict(zip(SEED_FEATURES, self._seed[found.row].tolist(), strict=True))
        values |= dict(zip(SITE_FEATURES, self._site[found.site].tolist(), strict=True))
        values = {"bias": 1.0, "progress": self._progress} | {name: value for name, value in values.items() if value != 0.0}
        chosen = [f"{key}={value}" for key, value in self.arm(found).items()]
        return values | dict.fromkeys([self._identity[found.site], *chosen], 1.0) | {f"{chosen[0]} × progress": self._progress}

    def vector(self, features: dict[str, float], posterior: Posterior) -> np.ndarray:
        """The features as the posterior orders them, ``[d]``."""
        x = np.zeros(len(posterior.mean))
        x[self._at(posterior, tuple(features))] = list(features.values())
        return x

    def arm(self, found: Found) -> dict[str, str]:
        """Blueprint, strategy and objective of a choice."""
        return dict(zip(("blueprint", "strategy", "objective"), self.arms[found.arm], strict=True))

    # --- the parts of the reward, for weights [draws, d] ---

    def _at(self, posterior: Posterior, names: tuple[str, ...]) -> list[int]:
        return [posterior.place[name] for name in names]

    def _of_sites(self, posterior: Posterior, weights: np.ndarray) -> np.ndarray:
        """``[draws, sites]``."""
        identity = weights[:, self._at(posterior, tuple(self._identity))]
        return np.asarray(weights[:, self._at(posterior, SITE_FEATURES)] @ self._site.T + identity)

    def _of_arms(self, posterior: Posterior, weights: np.ndarray) -> np.ndarray:
        """``[draws, arms]``."""
        parts = [self._at(posterior, tuple(f"{key}={arm[at]}" for arm in self.arms)) for at, key in enumerate(_KEYS)]
        later = self._at(posterior, tuple(f"blueprint={arm[0]} × progress" for arm in self.arms))
        return np.asarray(sum(weights[:, part] for part in parts) + self._progress * weights[:, later])

    def _of_run(self, posterior: Posterior, weights: np.ndarray) -> np.ndarray:
        bias, progress = self._at(posterior, ("bias", "progress"))
        return np.asarray(weights[..., bias] + self._progress * weights[..., progress])

    def state(self) -> dict[str, Any]:
        """JSON-able."""
        return self.senses.state()

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from ``state``."""
        self.senses.load_state(state)


_KEYS = ("blueprint", "strategy", "objective")
