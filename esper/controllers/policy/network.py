"""The network of the policy: from a situation to the probabilities of actions, and to the reward that they promise.

An action is chosen in parts: first its kind (wait, germinate, stop), then the site and at it blueprint, strategy, objective and seed, or
the branch to stop. Its probability is the product of theirs. All sites share their weights, and so do all seeds and all branches, so one
network fits hosts of any size.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from esper.controllers.policy.situation import BRANCH, RUN, SEED, SITE

WAIT, GERMINATE, STOP = KINDS = range(3)
KIND_NAMES = ("wait", "germinate", "stop")
HIDDEN = 32
WORDS = ("blueprint", "strategy", "objective")
"""The parts of a germination that are words, in the order of ``Words``."""
_NEVER = -1e9


@dataclass(frozen=True)
class Words:
    """The blueprints, strategies and objectives that a network knows."""

    blueprint: tuple[str, ...]
    strategy: tuple[str, ...]
    objective: tuple[str, ...]

    def all(self) -> tuple[tuple[str, ...], ...]:
        """In the order of ``WORDS``."""
        return self.blueprint, self.strategy, self.objective


@dataclass(frozen=True)
class Sights:
    """``D`` situations side by side, padded: ``run`` ``[D, R]``, ``site`` ``[D, S, F]``, ``branch`` ``[D, B, G]``.

    ``there`` bool ``[D, S]`` are real sites, ``open`` those where something may germinate, ``alive`` bool ``[D, B]`` branches that may be
    stopped.
    """

    run: Tensor
    site: Tensor
    there: Tensor
    open: Tensor
    branch: Tensor
    alive: Tensor

    def rows(self, wanted: Tensor) -> Sights:
        """Some of the situations."""
        return Sights(*(getattr(self, one.name)[wanted] for one in fields(self)))


@dataclass(frozen=True)
class Growths:
    """A germination in each of ``D`` situations: the site's number, the features of its seeds ``[D, n, 3]``, and the choices ``[D]``.

    ``seed_may`` bool ``[D, n]`` and ``word_may`` (of ``WORDS``, bool ``[D, words]``) are what could have been chosen.
    """

    site: Tensor
    seeds: Tensor
    seed_may: Tensor
    seed: Tensor
    words: tuple[Tensor, Tensor, Tensor]
    word_may: tuple[Tensor, Tensor, Tensor]

    def rows(self, wanted: Tensor) -> Growths:
        """Some of the germinations."""
        words, may = (tuple(one[wanted] for one in some) for some in (self.words, self.word_may))
        return Growths(self.site[wanted], self.seeds[wanted], self.seed_may[wanted], self.seed[wanted], words, may)  # type: ignore[arg-type]


class PolicyNetwork(nn.Module):
    """Two small layers for each part, with weights drawn from ``lot``."""

    def __init__(self, words: Words, hidden: int, lot: torch.Generator) -> None:
        super().__init__()
        self.words, self.hidden = words, hidden
        known = [len(one) for one in words.all()]
        self.sites = _layers(len(RUN) + len(SITE), hidden, hidden, lot)
        self.kinds = _layers(len(RUN) + 2 * hidden, hidden, len(KINDS), lot)
        self.place = _linear(hidden, 1, lot)
        self.seeds = _linear(hidden, len(SEED), lot)
        self.said = nn.ModuleList(_linear(hidden, count, lot) for count in known)
        self.stops = _layers(len(RUN) + len(BRANCH), hidden, 1, lot)
        self.gain = _layers(len(RUN) + len(SITE) + len(SEED) + sum(known), hidden, 1, lot)
        self.to_come = _layers(len(RUN) + len(BRANCH), hidden, 1, lot)
        self.usual = _layers(len(RUN) + 2 * hidden, hidden, 1, lot)

    # --- the parts of a choice, as log-probabilities ---

    def encode(self, sights: Sights) -> tuple[Tensor, Tensor]:
        """Of every site a vector ``[D, S, H]``, and of the whole run one ``[D, R + 2H]``."""
        run = sights.run[:, None, :].expand(-1, sights.site.shape[1], -1)
        sites = torch.tanh(self.sites(torch.cat([run, sights.site], 2)))
        there = sights.there[:, :, None]
        mean = (sites * there).sum(1) / there.sum(1).clamp(min=1)
        most = sites.masked_fill(~there, -1.0).amax(1)
        return sites, torch.cat([sights.run, mean, most], 1)

    def kind(self, whole: Tensor, may: Tensor) -> Tensor:
        """``[D, 3]``; ``may`` bool ``[D, 3]``."""
        return _log_softmax(self.kinds(whole), may)

    def site(self, sites: Tensor, may: Tensor) -> Tensor:
        """``[D, S]``."""
        return _log_softmax(self.place(sites).squeeze(2), may)

    def seed(self, at: Tensor, seeds: Tensor, may: Tensor) -> Tensor:
        """``[D, n]`` over the seeds of the chosen site, whose vector is ``at`` ``[D, H]``."""
        return _log_softmax((seeds @ self.seeds(at)[:, :, None]).squeeze(2), may)

    def word(self, place: int, at: Tensor, may: Tensor) -> Tensor:
        """``[D, words]`` over blueprints (0), strategies (1) or objectives (2)."""
        return _log_softmax(self.said[place](at), may)

    def stop(self, sights: Sights) -> Tensor:
        """``[D, B]`` over the branches under way."""
        return _log_softmax(self.stops(self._branches(sights)).squeeze(2), sights.alive)

    def may(self, sights: Sights) -> Tensor:
        """The kinds that are possible, bool ``[D, 3]``."""
        return torch.stack([torch.ones_like(sights.open[:, 0]), sights.open.any(1), sights.alive.any(1)], 1)

    # --- what an action promises ---

    def promised(self, sights: Sights, growths: Growths) -> Tensor:
        """The reward expected of each germination, ``[D]``."""
        rows = torch.arange(len(growths.site))
        known = [nn.functional.one_hot(chosen, len(words)).float() for chosen, words in zip(growths.words, self.words.all(), strict=True)]
        parts = [sights.run, sights.site[rows, growths.site], growths.seeds[rows, growths.seed], *known]
        return self.gain(torch.cat(parts, 1)).squeeze(1)  # type: ignore[no-any-return]

    def rest(self, sights: Sights) -> Tensor:
        """The reward that every branch under way is expected to earn from now on, ``[D, B]``."""
        return self.to_come(self._branches(sights)).squeeze(2)  # type: ignore[no-any-return]

    def baseline(self, whole: Tensor) -> Tensor:
        """The reward of what is usually done in a situation, ``[D]``: what an action is compared with when it is learnt."""
        return self.usual(whole).squeeze(1)  # type: ignore[no-any-return]

    def _branches(self, sights: Sights) -> Tensor:
        run = sights.run[:, None, :].expand(-1, sights.branch.shape[1], -1)
        return torch.cat([run, sights.branch], 2)


def _log_softmax(values: Tensor, may: Tensor) -> Tensor:
    """Over what may be; where nothing may, the same of everything."""
    return torch.log_softmax(values.masked_fill(~may, _NEVER), -1)


def _layers(inputs: int, hidden: int, outputs: int, lot: torch.Generator) -> nn.Sequential:
    return nn.Sequential(_linear(inputs, hidden, lot), nn.Tanh(), _linear(hidden, outputs, lot))


def _linear(inputs: int, outputs: int, lot: torch.Generator) -> nn.Linear:
    """A linear layer that draws from ``lot``, and leaves torch's global generator where it is."""
    layer: nn.Linear = nn.utils.skip_init(nn.Linear, inputs, outputs)
    nn.init.xavier_uniform_(layer.weight, generator=lot)
    nn.init.zeros_(layer.bias)
    return layer
