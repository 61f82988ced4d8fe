"""One choice of the network: drawn part by part, and told in plain values."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from esper.controllers.policy.network import GERMINATE, KIND_NAMES, STOP, WAIT, WORDS, Growths, PolicyNetwork, Sights
from esper.controllers.policy.situation import BRANCH, RUN, SEED, SITE, Situation

SHOWN = 3
"""Sites and branches whose probability an explanation names."""
DIGITS = 6


@dataclass(frozen=True)
class Legal:
    """What may be chosen: bool ``[S, words]`` for blueprints, ``[words]`` for strategies and objectives, ``[B]`` for branches."""

    growth: bool
    blueprints: np.ndarray
    strategies: np.ndarray
    objectives: np.ndarray
    stops: np.ndarray


@dataclass(frozen=True)
class Chosen:
    """An action: its kind, the rows of site and seed or of the branch, the words by ``WORDS``, and the parts of its explanation."""

    kind: int
    site: int = -1
    seed: int = -1
    branch: int = -1
    words: tuple[str, ...] = ()
    expected: float = 0.0
    features: dict[str, float] | None = None
    probabilities: dict[str, dict[str, float]] | None = None


def sights_of(situation: Situation, open_sites: np.ndarray, alive: np.ndarray) -> Sights:
    """One situation as a network takes it; at least one row of branches, which is none."""
    branch, stops = situation.branch, alive
    if not len(branch):
        branch, stops = np.zeros((1, len(BRANCH)), np.float32), np.zeros(1, bool)
    parts = (situation.run, situation.site, np.ones(len(situation.site), bool), open_sites, branch, stops)
    return Sights(*(torch.from_numpy(np.ascontiguousarray(part))[None] for part in parts))


class Chooser:
    """Draws from a network's probabilities; ``temperature`` 0 takes the likeliest of each part."""

    def __init__(self, network: PolicyNetwork, temperature: float) -> None:
        self.network, self.temperature = network, temperature

    @torch.no_grad()
    def choose(self, situation: Situation, legal: Legal, names: list[str], lot: np.random.Generator) -> Chosen:
        """One action out of what is legal; ``names`` are the sites'."""
        net = self.network
        free = situation.open_sites() & legal.blueprints.any(1) & legal.growth
        sights = sights_of(situation, free, legal.stops)
        sites, whole = net.encode(sights)
        kinds = self._chances(net.kind(whole, net.may(sights)))
        kind = self._drawn(kinds, lot)
        said = {"action": dict(zip(KIND_NAMES, map(_short, kinds.tolist()), strict=True))}
        run = dict(zip(RUN, situation.run.tolist(), strict=True))
        if kind == GERMINATE:
            return self._growth(situation, sights, sites, legal, names, lot, said, run)
        if kind == STOP:
            chances = self._chances(net.stop(sights))
            row = self._drawn(chances, lot)
            said["branch"] = _likeliest([f"{site} {seed}" for site, seed in situation.branches], chances)
            features = run | dict(zip(BRANCH, situation.branch[row].tolist(), strict=True))
            rest = float(net.rest(sights)[0, row])
            return Chosen(STOP, branch=row, expected=_short(-rest), features=_told(features), probabilities=said)
        return Chosen(WAIT, probabilities=said, features=_told(run))

    def _growth(
        self,
        situation: Situation,
        sights: Sights,
        sites: Tensor,
        legal: Legal,
        names: list[str],
        lot: np.random.Generator,
        said: dict[str, dict[str, float]],
        run: dict[str, float],
    ) -> Chosen:
        net = self.network
        chances = self._chances(net.site(sites, sights.open))
        site = self._drawn(chances, lot)
        said["site"] = _likeliest(names, chances)
        at, words = sites[:, site], []
        may = [torch.from_numpy(one)[None] for one in (legal.blueprints[site], legal.strategies, legal.objectives)]
        for place, (key, known) in enumerate(zip(WORDS, net.words.all(), strict=True)):
            chances = self._chances(net.word(place, at, may[place]))
            words.append(self._drawn(chances, lot))
            said[key] = _likeliest(known, chances)
        span = situation.seeds_of(site)
        seeds, free = torch.from_numpy(situation.seed[span])[None], torch.from_numpy(situation.free[span])[None]
        seed = self._drawn(self._chances(net.seed(at, seeds, free)), lot)
        ones = tuple(torch.tensor([word]) for word in words)
        growths = Growths(torch.tensor([site]), seeds, free, torch.tensor([seed]), ones, tuple(may))  # type: ignore[arg-type]
        features = run | dict(zip(SITE, situation.site[site].tolist(), strict=True))
        features |= dict(zip(SEED, situation.seed[span.start + seed].tolist(), strict=True))
        return Chosen(
            GERMINATE,
            site=site,
            seed=span.start + seed,
            words=tuple(known[word] for known, word in zip(net.words.all(), words, strict=True)),
            expected=_short(float(net.promised(sights, growths)[0])),
            features=_told(features),
            probabilities=said,
        )

    def _chances(self, logs: Tensor) -> np.ndarray:
        """Probabilities ``[n]`` at the temperature; at 0 all of it is at the likeliest."""
        values = logs[0].double()
        if self.temperature == 0.0:
            chances = torch.zeros_like(values)
            chances[int(values.argmax())] = 1.0
        else:
            chances = torch.softmax(values / self.temperature, 0)
        return np.asarray(chances.numpy())

    @staticmethod
    def _drawn(chances: np.ndarray, lot: np.random.Generator) -> int:
        """A row, by one number of the generator; a probability of 0 is never drawn."""
        row = int(np.searchsorted(np.cumsum(chances), lot.random() * chances.sum(), side="right"))
        return min(row, int(np.flatnonzero(chances > 0.0)[-1]))


def _likeliest(names: list[str] | tuple[str, ...], chances: np.ndarray) -> dict[str, float]:
    rows = np.argsort(-chances[: len(names)], kind="stable")[:SHOWN]
    return {names[row]: _short(float(chances[row])) for row in rows}


def _told(features: dict[str, float]) -> dict[str, float]:
    """Features that are not zero, in few digits."""
    return {name: _short(value) for name, value in features.items() if value != 0.0}


def _short(value: float) -> float:
    return round(value, DIGITS) if math.isfinite(value) else 0.0
