"""What a training left: held-out measurements, and the history of every recorded value."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class Outcome:
    """Held-out measurements (``test/…`` only once the training is finished), history ``(tick, name, value)``, optimizer steps."""

    final: dict[str, float] = field(default_factory=dict)
    best: dict[str, float] = field(default_factory=dict)
    history: list[tuple[int, str, float]] = field(default_factory=list)
    steps: int = 0

    def state(self) -> dict[str, Any]:
        """Everything that is known before the end, for a checkpoint."""
        return {"steps": self.steps, "best": dict(self.best), "history": _packed(self.history)}

    def load(self, state: dict[str, Any]) -> None:
        """Take over a saved state."""
        self.steps = int(state["steps"])
        self.best = {name: float(value) for name, value in state["best"].items()}
        self.history = _unpacked(state["history"])


def _packed(history: list[tuple[int, str, float]]) -> dict[str, Any]:
    names = list(dict.fromkeys(name for _, name, _ in history))
    index = {name: number for number, name in enumerate(names)}
    return {
        "names": names,
        "ticks": torch.tensor([tick for tick, _, _ in history], dtype=torch.int64),
        "which": torch.tensor([index[name] for _, name, _ in history], dtype=torch.int32),
        "values": torch.tensor([value for _, _, value in history], dtype=torch.float64),
    }


def _unpacked(saved: dict[str, Any]) -> list[tuple[int, str, float]]:
    columns: list[Tensor] = [saved["ticks"], saved["which"], saved["values"]]
    rows = zip(*(column.tolist() for column in columns), strict=True)
    return [(tick, saved["names"][which], value) for tick, which, value in rows]
