"""Learning-rate schedules: each a pure factor of (step, total steps), lengths as shares of the run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

from esper.setting_fields import setting


def _warmup(default: float) -> Any:
    return setting(default, low=0.0, high=1.0, unit="share of the run", help="linear rise at the start")


def _decay(default: float) -> Any:
    return setting(default, low=0.0, high=1.0, unit="share of the run", help="last part, in which the factor falls")


def _final() -> Any:
    return setting(0.0, low=0.0, high=1.0, help="factor at the end")


class Schedule(Protocol):
    """Gives the learning rate's factor over the run."""

    def factor(self, step: int, total: int) -> float:
        """Factor for the 0-based ``step`` of ``total``, at most 1; a warm-up rises from 1/its steps."""


@dataclass
class ConstantConfig:
    """The same learning rate throughout."""

    name: str = "constant"
    warmup: float = _warmup(0.0)

    def factor(self, step: int, total: int) -> float:
        """1 after the warm-up."""
        return _rise(step, round(self.warmup * total))


@dataclass
class ConstantThenDecayConfig:
    """A constant rate while the host grows, and a linear decay at the end."""

    name: str = "constant_then_decay"
    warmup: float = _warmup(0.0)
    decay: float = _decay(0.3)
    final: float = _final()

    def factor(self, step: int, total: int) -> float:
        """1 between warm-up and decay."""
        warmup = round(self.warmup * total)
        if step < warmup:
            return _rise(step, warmup)
        left = min(1.0, (total - step) / max(1, round(self.decay * total)))
        return self.final + (1.0 - self.final) * left


@dataclass
class CosineConfig:
    """Half a cosine from the first step."""

    name: str = "cosine"
    final: float = _final()

    def factor(self, step: int, total: int) -> float:
        """From 1 at the first step."""
        return _half_cosine(step, total, self.final)


@dataclass
class WarmupCosineConfig:
    """A linear rise, then half a cosine."""

    name: str = "warmup_cosine"
    warmup: float = _warmup(0.05)
    final: float = _final()

    def factor(self, step: int, total: int) -> float:
        """From 1 at the end of the warm-up."""
        warmup = round(self.warmup * total)
        return _rise(step, warmup) if step < warmup else _half_cosine(step - warmup, total - warmup, self.final)


@dataclass
class WarmupStableDecayConfig:
    """A linear rise, one rate for most of the run, and a fall at the end (Hu et al. 2024; Hägele et al. 2024)."""

    name: str = "warmup_stable_decay"
    warmup: float = _warmup(0.02)
    decay: float = _decay(0.2)
    shape: str = setting("linear", choices=("linear", "sqrt", "cosine"), help="of the fall; sqrt: 1 − √ of the part that is over")
    final: float = _final()

    def factor(self, step: int, total: int) -> float:
        """1 between rise and fall; where the two overlap, the smaller one."""
        length = max(1, round(self.decay * total))
        gone = min(1.0, max(0, step - (total - length)) / length)
        left = {"linear": 1.0 - gone, "sqrt": 1.0 - math.sqrt(gone), "cosine": 0.5 * (1.0 + math.cos(math.pi * gone))}[self.shape]
        return min(_rise(step, round(self.warmup * total)), self.final + (1.0 - self.final) * left)


SCHEDULES: dict[str, type] = {
    "constant": ConstantConfig,
    "constant_then_decay": ConstantThenDecayConfig,
    "cosine": CosineConfig,
    "warmup_cosine": WarmupCosineConfig,
    "warmup_stable_decay": WarmupStableDecayConfig,
}


def _rise(step: int, warmup: int) -> float:
    return (step + 1) / warmup if step < warmup else 1.0


def _half_cosine(step: int, total: int, final: float) -> float:
    """``final + (1 − final) · ½ (1 + cos(π · step / total))`` (Loshchilov & Hutter 2017, without restarts)."""
    progress = min(1.0, step / max(1, total))
    return final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * progress))
