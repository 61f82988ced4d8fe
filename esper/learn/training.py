"""Training of a policy: imitation of what was done, then advantage-weighted improvement towards what paid.

The improvement is advantage-weighted regression (Peng et al. 2019, arXiv:1910.00177): every decision is imitated with the weight
``exp(A / β)``, at most ``MOST_WEIGHT``, where the advantage ``A = R − V(s)`` is what it earned beyond what is usually earned in its
situation. ``V`` is learnt beside the policy by regression, and ``A`` is in units of its own spread over all decisions. ``R`` is a
decision's own: a germination's reward at the end of the branch's life, nothing for waiting, and for a stop what the branch was expected to
earn from then on, with the opposite sign.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from esper.controllers.policy.network import GERMINATE, HIDDEN, KIND_NAMES, STOP, WAIT, WORDS, Growths, PolicyNetwork, Sights, Words
from esper.learn.examples import Example
from esper.randomness import generator

IMITATION, IMPROVEMENT = 150, 100
"""Passes over all decisions."""
RATE, DECAY = 3e-3, 0.1
BETA = 1.0
"""``β``: the smaller, the more only the best decisions count."""
MOST_WEIGHT = 20.0


@dataclass(frozen=True)
class Data:
    """Decisions side by side, padded: ``kind`` and ``reward`` ``[D]``, ``stopped`` ``[D]`` the branches that were stopped.

    ``growths`` are those of ``grown`` ``[G]``, the decisions that germinated; ``rest`` ``[D, B]`` is NaN where it is not known.
    """

    sights: Sights
    kind: Tensor
    reward: Tensor
    stopped: Tensor
    rest: Tensor
    grown: Tensor
    growths: Growths

    def __len__(self) -> int:
        return len(self.kind)


def words_of(examples: list[Example]) -> Words:
    """The blueprints, strategies and objectives that germinated."""
    said = [example.words for example in examples if example.kind == GERMINATE]
    return Words(*(tuple(sorted({one[place] for one in said})) for place in range(len(WORDS))))


def tensors(examples: list[Example], words: Words) -> Data:
    """Examples as tensors; a germination by a word that is not among ``words`` must not be among them."""
    run = np.stack([one.situation.run for one in examples])
    site, there = _padded([one.situation.site for one in examples])
    branch, alive = _padded([one.situation.branch for one in examples])
    open_ = np.zeros_like(there)
    rest = np.full(alive.shape, math.nan, np.float32)
    for row, one in enumerate(examples):
        open_[row, : len(one.open)] = one.open
        rest[row, : len(one.rest)] = one.rest
    parts = (run, site, there, open_, branch, alive)
    kind = torch.tensor([one.kind for one in examples])
    grown = [one for one in examples if one.kind == GERMINATE]
    return Data(
        Sights(*map(torch.from_numpy, parts)),
        kind,
        torch.tensor([one.reward for one in examples], dtype=torch.float32),
        torch.tensor([max(0, one.branch) for one in examples]),
        torch.from_numpy(rest),
        torch.nonzero(kind == GERMINATE).flatten(),
        _growths(grown, words),
    )


def _growths(grown: list[Example], words: Words) -> Growths:
    seeds, real = _padded([one.seeds for one in grown])
    may = np.zeros_like(real)
    for row, one in enumerate(grown):
        may[row, : len(one.seed_may)] = one.seed_may
    known = words.all()
    chosen = [torch.tensor([known[place].index(one.words[place]) for one in grown], dtype=torch.int64) for place in range(len(WORDS))]
    fits = torch.tensor([[word in one.blueprints[one.site] for word in words.blueprint] for one in grown], dtype=torch.bool)
    could = (
        fits.reshape(len(grown), len(words.blueprint)),
        *(torch.ones(len(grown), len(known[place]), dtype=torch.bool) for place in (1, 2)),
    )
    site, seed = (torch.tensor([getattr(one, name) for one in grown], dtype=torch.int64) for name in ("site", "seed"))
    return Growths(site, torch.from_numpy(seeds), torch.from_numpy(may), seed, tuple(chosen), could)  # type: ignore[arg-type]


def _padded(parts: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Arrays ``[n, F]`` as one float32 ``[D, most, F]``, and which rows are real, bool ``[D, most]``; at least one row each."""
    most = max([1, *(len(part) for part in parts)])
    width = parts[0].shape[1] if parts else 1
    made, real = np.zeros((len(parts), most, width), np.float32), np.zeros((len(parts), most), bool)
    for row, part in enumerate(parts):
        made[row, : len(part)] = part
        real[row, : len(part)] = True
    return made, real


def log_probability(network: PolicyNetwork, data: Data) -> tuple[Tensor, Tensor]:
    """The log-probability of every decision ``[D]``, and the vector of every situation ``[D, R + 2H]``."""
    sights = data.sights
    sites, whole = network.encode(sights)
    found = network.kind(whole, network.may(sights)).gather(1, data.kind[:, None]).squeeze(1)
    found = found + torch.where(data.kind == STOP, network.stop(sights).gather(1, data.stopped[:, None]).squeeze(1), 0.0)
    if len(data.grown):
        grown, mine = data.growths, sites[data.grown]
        rows = torch.arange(len(data.grown))
        at = mine[rows, grown.site]
        part = network.site(mine, sights.open[data.grown])[rows, grown.site]
        part = part + network.seed(at, grown.seeds, grown.seed_may)[rows, grown.seed]
        for place in range(len(WORDS)):
            part = part + network.word(place, at, grown.word_may[place])[rows, grown.words[place]]
        found = found.index_add(0, data.grown, part)
    return found, whole


def uniform(data: Data) -> float:
    """The mean log-probability of decisions drawn evenly, part by part, from all that could be."""
    kinds = 1 + data.sights.open.any(1).long() + data.sights.alive.any(1).long()
    found = -kinds.double().log()
    found -= torch.where(data.kind == STOP, data.sights.alive.sum(1).clamp(min=1).double().log(), 0.0)
    grown = data.growths
    if len(data.grown):
        counts = [data.sights.open[data.grown].sum(1), grown.seed_may.sum(1), *(may.sum(1) for may in grown.word_may)]
        found.index_add_(0, data.grown, -sum(count.clamp(min=1).double().log() for count in counts))  # type: ignore[arg-type]
    return float(found.mean())


def train(data: Data, words: Words, seed: int) -> tuple[PolicyNetwork, PolicyNetwork]:
    """The network after imitation, and after improvement; the same decisions and ``seed`` lead to the same weights."""
    network = PolicyNetwork(words, HIDDEN, generator(seed, "policy"))
    optimizer = torch.optim.AdamW(network.parameters(), lr=RATE, weight_decay=DECAY)
    for _ in range(IMITATION):
        _step(network, optimizer, data, None)
    imitating = PolicyNetwork(words, HIDDEN, generator(seed, "policy"))
    imitating.load_state_dict(network.state_dict())
    for _ in range(IMPROVEMENT):
        _step(network, optimizer, data, weights(network, data))
    return imitating, network


def _step(network: PolicyNetwork, optimizer: torch.optim.Optimizer, data: Data, weight: Tensor | None) -> None:
    optimizer.zero_grad()
    logs, whole = log_probability(network, data)
    policy = -(logs if weight is None else weight * logs).mean()
    (policy + _errors(network, data, whole)).backward()
    torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
    optimizer.step()


def _errors(network: PolicyNetwork, data: Data, whole: Tensor) -> Tensor:
    """Mean squared errors of what is predicted, in units of the rewards' mean square: a germination's reward, a rest, and ``V``."""
    sights, grown = data.sights, data.grown
    rest = network.rest(sights)
    known = torch.isfinite(data.rest)
    wanted = returns(data, rest.detach())
    size = wanted.square().mean().clamp(min=1e-8)
    found = (network.baseline(whole.detach()) - wanted).square().mean()
    if len(grown):
        found = found + (network.promised(sights.rows(grown), data.growths) - data.reward[grown]).square().mean()
    if known.any():
        found = found + (rest - data.rest)[known].square().mean()
    return found / size


def returns(data: Data, rest: Tensor) -> Tensor:
    """``R`` of every decision, ``[D]``; of a stop what its branch would have earned, by the estimate ``rest`` ``[D, B]``, sign reversed."""
    stops = -rest.gather(1, data.stopped[:, None]).squeeze(1)
    return torch.where(data.kind == STOP, stops, torch.where(data.kind == WAIT, torch.zeros_like(stops), data.reward.nan_to_num()))


@torch.no_grad()
def weights(network: PolicyNetwork, data: Data) -> Tensor:
    """``exp(A / β)`` of every decision, at most ``MOST_WEIGHT``, scaled to a mean of 1, ``[D]``."""
    _, whole = network.encode(data.sights)
    advantage = returns(data, network.rest(data.sights)) - network.baseline(whole)
    spread = advantage.std(unbiased=False).clamp(min=1e-8)
    weight = torch.exp((advantage / spread / BETA).clamp(max=math.log(MOST_WEIGHT)))
    return weight / weight.mean()


@dataclass(frozen=True)
class Held:
    """How a policy does on runs that it did not see: mean log-probability of decisions, and RMS errors of predicted rewards."""

    imitated: float
    improved: float
    uniform: float
    error: float
    mean_error: float


@torch.no_grad()
def held_out(imitating: PolicyNetwork, improved: PolicyNetwork, data: Data, mean: float) -> Held:
    """The figures on ``data``; ``mean`` is the mean reward of the germinations that were learnt from, the prediction to beat."""
    logs = [float(log_probability(network, data)[0].mean()) for network in (imitating, improved)]
    rewards = data.reward[data.grown]
    predicted = improved.promised(data.sights.rows(data.grown), data.growths)
    errors = [float((one - rewards).square().mean().sqrt()) for one in (predicted, torch.full_like(rewards, mean))]
    return Held(logs[0], logs[1], uniform(data), errors[0], errors[1])


def counts(data: Data) -> dict[str, int]:
    """Decisions by kind."""
    return {name: int((data.kind == kind).sum()) for kind, name in enumerate(KIND_NAMES)}
