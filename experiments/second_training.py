"""What the studies ``mend`` and ``adapt`` share: a small host trained on digits, and the ways of training it a second time.

``fine_tune`` trains every parameter of the host, ``head`` the last layer alone, ``lora`` low-rank terms of all layers beside a frozen host
(Hu et al. 2022; initialized as peft does it), ``seeds`` branches of esper beside a frozen host, which learn from the task at once, and
``judged`` the same through the whole default life of a seed: isolated, blended, frozen, judged, fine-tuned.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize

from esper import attach
from esper.blueprints import Width
from esper.controllers.scheduled import ScheduledConfig
from esper.engine.learning.branch_optimizer import BranchLearning
from esper.grafting import CONFIGS as STRATEGIES
from esper.lifecycle import LifecycleConfig
from esper.randomness import generator

WIDTH, BATCH = 48, 32
Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Data:
    """Samples ``[n, 64]`` and labels ``[n]`` to learn from, to judge branches with, and to measure with."""

    train: Batch
    judge: Batch
    test: Batch

    def changed(self, change: Callable[[Tensor, Tensor], Batch]) -> Data:
        """The same samples after a change."""
        return Data(*(change(*part) for part in (self.train, self.judge, self.test)))


def digits(seed: int) -> Data:
    """The 1,797 digits of scikit-learn in three parts that the seed draws: 1,097, 200 and 500."""
    from sklearn.datasets import load_digits

    found = load_digits()
    inputs, labels = torch.tensor(found.data, dtype=torch.float32) / 8.0 - 1.0, torch.tensor(found.target)
    order = torch.randperm(len(labels), generator=generator(seed, "data"))
    train, judge, test = order.split([1097, 200, 500])
    return Data(*((inputs[part], labels[part]) for part in (train, judge, test)))


def network(draws: torch.Generator) -> nn.Sequential:
    """Two hidden layers of WIDTH rectified units."""
    net = nn.Sequential(nn.Linear(64, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 10))
    with torch.no_grad():
        for parameter in net.parameters():
            bound = 1.0 / math.sqrt(parameter.shape[-1]) if parameter.dim() == 2 else 0.0
            parameter.uniform_(-bound, bound, generator=draws)
    return net


def loss_of(net: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy, one value a sample."""
    return functional.cross_entropy(net(batch[0]), batch[1], reduction="none")


def batches(data: Batch, steps: int, draws: torch.Generator) -> Iterator[Batch]:
    """``steps`` batches, pass after pass in new orders."""
    order = torch.zeros(0, dtype=torch.long)
    for _ in range(steps):
        if len(order) < BATCH:
            order = torch.randperm(len(data[1]), generator=draws)
        part, order = order[:BATCH], order[BATCH:]
        yield data[0][part], data[1][part]


def train(net: nn.Module, data: Batch, steps: int, lr: float, seed: int) -> None:
    """Adam on what wants a gradient; the rate falls to zero over the last 30 % of the steps."""
    optimizer = torch.optim.Adam([parameter for parameter in net.parameters() if parameter.requires_grad], lr=lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: falling(step, steps))
    for batch in batches(data, steps, generator(seed, "order")):
        optimizer.zero_grad()
        loss_of(net, batch).mean().backward()
        optimizer.step()
        schedule.step()


def falling(step: int, steps: int) -> float:
    """The schedule's factor."""
    return min(1.0, (steps - step) / (0.3 * steps))


@torch.no_grad()
def accuracy(net: nn.Module, data: Batch) -> float:
    """Share of correct predictions."""
    return float((net(data[0]).argmax(1) == data[1]).float().mean())


def trained_host(data: Batch, steps: int, seed: int) -> nn.Sequential:
    """The host after its first training."""
    net = network(generator(seed, "host"))
    train(net, data, steps, 3e-3, seed)
    return net


class LowRank(nn.Module):
    """``W + B·A``: ``A`` as peft draws it, ``B`` zero; the scale is 1."""

    def __init__(self, weight: Tensor, rank: int, draws: torch.Generator) -> None:
        super().__init__()
        bound = 1.0 / math.sqrt(weight.shape[1])
        self.first = nn.Parameter(torch.empty(rank, weight.shape[1]).uniform_(-bound, bound, generator=draws))
        self.second = nn.Parameter(torch.zeros(weight.shape[0], rank))

    def forward(self, weight: Tensor) -> Tensor:
        """The weight with its low-rank term."""
        return weight + self.second @ self.first


def added_by(units: int, net: nn.Sequential) -> int:
    """Parameters that a ``width`` branch of ``units`` at either site adds."""
    first, second, third = (layer for layer in net if isinstance(layer, nn.Linear))
    ins = first.in_features + 1 + second.out_features, second.in_features + 1 + third.out_features
    return units * sum(ins)


def second_training(arm: str, net: nn.Sequential, data: Data, lr: float, units: int, steps: int, seed: int) -> tuple[nn.Module, int]:
    """Train the host again in the way of the arm; returns the net and the number of parameters that were added."""
    if arm == "nothing":
        return net, 0
    if arm == "fine_tune":
        train(net, data.train, steps, lr, seed)
        return net, 0
    net.requires_grad_(False)
    if arm == "head":
        net[-1].requires_grad_(True)
        train(net, data.train, steps, lr, seed)
        return net, 0
    if arm == "lora":
        return net, _lora(net, data, lr, units, steps, seed)
    return _grown(arm, net, data, lr, units, steps, seed)


def _lora(net: nn.Sequential, data: Data, lr: float, units: int, steps: int, seed: int) -> int:
    layers = [layer for layer in net if isinstance(layer, nn.Linear)]
    rank = max(1, round(added_by(units, net) / sum(layer.in_features + layer.out_features for layer in layers)))
    draws = generator(seed, "branches")
    for layer in layers:
        parametrize.register_parametrization(layer, "weight", LowRank(layer.weight, rank, draws))
    train(net, data.train, steps, lr, seed)
    return sum(rank * (layer.in_features + layer.out_features) for layer in layers)


def _grown(arm: str, net: nn.Sequential, data: Data, lr: float, units: int, steps: int, seed: int) -> tuple[nn.Module, int]:
    """One ``width`` branch in either hidden layer of the frozen host."""
    before = sum(parameter.numel() for parameter in net.parameters())
    judge = list(zip(data.judge[0].split(100), data.judge[1].split(100), strict=True))
    at_once = LifecycleConfig(
        training_min="0%", readiness=-1.0, grafting_min="96%", grafting_max="100%", stabilization_min="0%", stabilization_max="100%",
        evaluating_min="0%", fine_tuning_min="0%", guard=False,
    )  # fmt: skip
    optimizer = torch.optim.Adam(net.parameters(), lr=lr)  # of the frozen host: the branches follow its schedule
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: falling(step, steps))
    grow = attach(
        net,
        total_steps=steps,
        loss=loss_of,
        optimizer=optimizer,
        judge=judge,
        blueprint=Width(units=units),
        grafting=STRATEGIES["linear"](ramp="0%" if arm == "seeds" else "5%"),
        lifecycle=at_once if arm == "seeds" else LifecycleConfig(),
        learning=BranchLearning(lr=lr, weight_decay=0.0),
        controller=ScheduledConfig(script=[{"at": "1step", "command": "germinate"}]),
        seed=seed,
        count_macs=False,
    )
    for batch in batches(data.train, steps, generator(seed, "order")):
        loss = loss_of(net, batch).mean()
        if loss.requires_grad:
            loss.backward()
        grow.after_backward(batch, loss.detach())
        optimizer.step()
        schedule.step()
        grow.tick(loss.detach())
        optimizer.zero_grad()
    grow.close()
    plain = grow.export()
    return plain, sum(parameter.numel() for parameter in plain.parameters()) - before
