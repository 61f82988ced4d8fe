"""Learning-rate schedules as a pure factor of (step, total steps)."""

from __future__ import annotations

import math

from esper.training.config import SchedulerConfig

SCHEDULES = ("constant", "constant_then_decay", "cosine", "warmup_cosine")


def factor(config: SchedulerConfig, step: int, total: int) -> float:
    """Factor for the 0-based ``step`` of ``total``, between ``final`` and 1 (and rising from 1/warm-up steps at first)."""
    assert config.name in SCHEDULES, config.name
    warmup = round(config.warmup * total)
    if step < warmup:
        return (step + 1) / warmup
    if config.name == "constant":
        return 1.0
    if config.name == "constant_then_decay":
        decay = max(1, round(config.decay * total))
        left = min(1.0, (total - step) / decay)
        return config.final + (1.0 - config.final) * left
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return config.final + (1.0 - config.final) * 0.5 * (1.0 + math.cos(math.pi * progress))
