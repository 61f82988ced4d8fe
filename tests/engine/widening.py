"""Hosts with hidden layers, and loops that widen them at once."""

from __future__ import annotations

from typing import Any

import torch
from growing import Loop, germinate, sample_loss, short
from torch import Tensor, nn
from torch.nn import functional

from esper.blueprints import Width
from esper.engine.learning.branch_optimizer import BranchLearning
from esper.grafting.config import LinearConfig

AT_ONCE: dict[str, Any] = {
    "grafting": LinearConfig(ramp="0step"),
    "lifecycle": short(training_min="0step", grafting_min="60step", grafting_max="90step"),
    "learning": BranchLearning(0.01),
}


X = torch.randn(9, 6, generator=torch.Generator().manual_seed(8))


class Deep(nn.Module):
    """Three layers behind each other, with another activation and a dropout between them; ``skip`` is no hidden layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.skip = nn.Linear(6, 5), nn.Linear(5, 4, bias=False), nn.Linear(4, 3), nn.Linear(3, 3)
        self.drop = nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = functional.gelu(self.a(x))
        return self.skip(self.c(self.drop(torch.tanh(self.b(hidden)))))


def deep() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return Deep()


class Series(nn.Sequential):
    """Convolutions of another stride, padding and dilation behind each other, over a series."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.dim() == 3 else x.unsqueeze(1))


def series() -> nn.Module:
    layers = [nn.Conv1d(1, 5, 3, padding=2), nn.SiLU(), nn.Conv1d(5, 4, 3, stride=2, padding=2, dilation=2), nn.Flatten(), nn.Linear(16, 3)]
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return Series(*layers)


def grown(host: str, blueprint: Width, site: str, **changes: Any) -> Loop:
    settings = AT_ONCE | {"blueprint": blueprint} | changes
    return Loop(host, settings=settings, commands={3: [germinate(site)]})


def plain_loss(model: nn.Module, data: tuple[Tensor, Tensor]) -> Tensor:
    return sample_loss(model, (data[0] if data[0].dtype == torch.int64 else data[0].double(), data[1])).mean()
