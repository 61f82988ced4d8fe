"""The arms without esper: plain SGD and Adam, and three published ways of keeping a network plastic.

The network has two hidden layers of rectified units. Every learner takes its base optimizer (``sgd`` or ``adam``) from its settings, so
that the choice of it is tuned like a rate.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

INPUTS, CLASSES = 64, 10


def network(width: int, draws: torch.Generator) -> nn.Sequential:
    """64 inputs, two hidden layers of ``width``, ten outputs; He's initialization, biases zero."""
    net = nn.Sequential(nn.Linear(INPUTS, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, CLASSES))
    with torch.no_grad():
        for layer in net:
            if isinstance(layer, nn.Linear):
                layer.weight.copy_(incoming(layer.weight.shape, draws))
                layer.bias.zero_()
    return net


def incoming(shape: torch.Size | tuple[int, ...], draws: torch.Generator) -> Tensor:
    """Weights ``[out, in]`` drawn uniformly with variance 2/in (He et al. 2015)."""
    return torch.empty(shape).uniform_(-1.0, 1.0, generator=draws) * (6.0 / shape[1]) ** 0.5


def optimizer_of(net: nn.Module, base: str, lr: float) -> torch.optim.Optimizer:
    """SGD or Adam."""
    return torch.optim.SGD(net.parameters(), lr=lr) if base == "sgd" else torch.optim.Adam(net.parameters(), lr=lr)


class Learner:
    """Backprop and nothing else: the arms ``sgd`` and ``adam``."""

    def __init__(self, settings: Mapping[str, Any], width: int, draws: torch.Generator) -> None:
        self.settings, self.draws = settings, draws
        self.net = network(width, draws)
        self.optimizer = optimizer_of(self.net, settings["base"], settings["lr"])

    def step(self, inputs: Tensor, labels: Tensor) -> int:
        """Predict, count the correct predictions, then learn from the batch."""
        out = self.net(inputs)
        loss = functional.cross_entropy(out, labels) + self.penalty()
        self.optimizer.zero_grad()
        loss.backward()
        self.learn(inputs, labels, loss)
        return int((out.argmax(1) == labels).sum())

    def learn(self, inputs: Tensor, labels: Tensor, loss: Tensor) -> None:
        """What follows the backward pass."""
        self.optimizer.step()
        self.after()

    def penalty(self) -> Tensor | float:
        """What is added to the loss."""
        return 0.0

    def after(self) -> None:
        """What follows a step of the optimizer."""

    def parameters(self) -> int:
        """Parameters of the network."""
        return sum(parameter.numel() for parameter in self.net.parameters())

    def counts(self) -> dict[str, int]:
        """Branches that germinated and that were culled."""
        return {"germinated": 0, "culled": 0}


class L2Init(Learner):
    """A pull towards the initial weights, ``strength · ‖θ − θ₀‖²`` (regenerative regularization, Kumar et al. 2023)."""

    def __init__(self, settings: Mapping[str, Any], width: int, draws: torch.Generator) -> None:
        super().__init__(settings, width, draws)
        self.host = list(self.net.parameters())  # what grows later is not pulled
        self.initial = [parameter.detach().clone() for parameter in self.host]

    def penalty(self) -> Tensor:
        """The squared distance from the initial weights."""
        pairs = zip(self.host, self.initial, strict=True)
        return self.settings["strength"] * sum((((now - then) ** 2).sum() for now, then in pairs), torch.zeros(()))


class ShrinkPerturb(Learner):
    """After every step all weights shrink by ``strength`` and get as large a share of freshly drawn ones (Ash & Adams 2020)."""

    @torch.no_grad()
    def after(self) -> None:
        """Shrink and perturb; the noise of many steps adds up to the size of initial weights."""
        share = self.settings["strength"]
        for layer in self.net:
            if isinstance(layer, nn.Linear):
                noise = incoming(layer.weight.shape, self.draws) * (2.0 * share) ** 0.5
                layer.weight.mul_(1.0 - share).add_(noise)
                layer.bias.mul_(1.0 - share)


class ContinualBackprop(Learner):
    """Mature units of the lowest utility are drawn anew, with no outgoing weights (Dohare et al. 2024, algorithm 1).

    ``strength`` is the share of the mature units that is replaced a step. Utility is a running mean (decay 0.99) of ``|h| · Σ|w_out|``.
    """

    DECAY = 0.99
    MATURITY = 100

    def __init__(self, settings: Mapping[str, Any], width: int, draws: torch.Generator) -> None:
        super().__init__(settings, width, draws)
        linear = [layer for layer in self.net if isinstance(layer, nn.Linear)]
        self.pairs = list(pairwise(linear))
        self.active = [torch.zeros(0)] * len(self.pairs)
        self.utility = [torch.zeros(width) for _ in self.pairs]
        self.mean = [torch.zeros(width) for _ in self.pairs]
        self.age = [torch.zeros(width) for _ in self.pairs]
        self.due = [0.0] * len(self.pairs)
        rectified = [layer for layer in self.net if isinstance(layer, nn.ReLU)]
        for number, layer in enumerate(rectified):
            layer.register_forward_hook(lambda _module, _given, out, number=number: self._note(number, out))

    def _note(self, number: int, out: Tensor) -> None:
        self.active[number] = out.detach()

    @torch.no_grad()
    def after(self) -> None:
        """Update ages and utilities, and replace the units that are due."""
        for number, (before, behind) in enumerate(self.pairs):
            active, age, utility = self.active[number], self.age[number], self.utility[number]
            age += 1
            utility.mul_(self.DECAY).add_(active.abs().mean(0) * behind.weight.abs().sum(0), alpha=1.0 - self.DECAY)
            self.mean[number].mul_(self.DECAY).add_(active.mean(0), alpha=1.0 - self.DECAY)
            mature = age > self.MATURITY
            self.due[number] += self.settings["strength"] * float(mature.sum())
            count = min(int(self.due[number]), int(mature.sum()))
            if count:
                self.due[number] -= count
                corrected = (utility / (1.0 - self.DECAY**age)).masked_fill(~mature, float("inf"))
                self._replace(number, before, behind, corrected.topk(count, largest=False).indices)

    def _replace(self, number: int, before: nn.Linear, behind: nn.Linear, units: Tensor) -> None:
        mean = self.mean[number][units] / (1.0 - self.DECAY ** self.age[number][units])
        behind.bias += behind.weight[:, units] @ mean  # the output keeps its mean
        before.weight[units] = incoming((len(units), before.in_features), self.draws)
        before.bias[units] = 0.0
        behind.weight[:, units] = 0.0
        for parameter, places in ((before.weight, units), (before.bias, units), (behind.weight, (slice(None), units))):
            for value in self.optimizer.state.get(parameter, {}).values():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    value[places] = 0.0
        for value in (self.utility[number], self.mean[number], self.age[number]):
            value[units] = 0.0


KINDS: dict[str, type[Learner]] = {
    "backprop": Learner,
    "l2_init": L2Init,
    "shrink_perturb": ShrinkPerturb,
    "continual_backprop": ContinualBackprop,
}
