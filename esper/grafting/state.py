"""The memory of the strategies about each branch: one float32 matrix ``[n, STATE_WIDTH]`` whose columns have names.

All strategies share the layout, so that branches on different strategies sit in one tensor that checkpoints as it is.
Every column starts at zero: a fresh branch is a row of zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

#: Past gradient norms kept for the running median.
WINDOW = 15

#: Columns that a rule of the user's own may use as it likes.
OWN = 4

#: Strategies that ``adaptive`` chooses from, in the order of its ``choice`` and ``paid_…`` columns.
CHOICES = ("linear", "drift", "momentum", "stability", "grad_norm", "performance")

#: Ramp position, the same for every strategy: ``elapsed`` ticks of ramp covered, ``held`` ticks of ramp given up so far
#: (against ``max_hold``), and the ``alpha`` last handed out.
SHARED = ("elapsed", "held", "alpha")

#: Saved states hold them in this order: append only.
COLUMNS = (
    *SHARED,
    "drift_hold",  # drift: ticks of the present hold still to go
    "velocity",  # momentum
    "metric_last",
    "metric_seen",
    "gain_speed",  # performance: last known speed, minus one
    "grad_count",  # grad_norm, stability: how many of the window's entries are filled
    *(f"grad_{i}" for i in range(WINDOW)),  # newest first
    "metric_mean",  # stability
    "metric_variance",
    "metric_count",
    "trouble",  # consecutive ticks out of band
    "stable",  # elapsed at the last tick in band
    "choice",  # adaptive
    "rival",
    "rival_ticks",
    "gain_last",
    "gain_seen",
    *(f"paid_{name}" for name in CHOICES),
    *(f"own_{i}" for i in range(OWN)),  # custom
)
STATE_WIDTH = len(COLUMNS)
_INDEX = {name: i for i, name in enumerate(COLUMNS)}


def initial_state(n: int, device: torch.device | str | None = None) -> Tensor:
    """State of ``n`` branches that have just entered GRAFTING: zeros ``[n, STATE_WIDTH]``, float32."""
    return torch.zeros(n, STATE_WIDTH, dtype=torch.float32, device=device)


def widened(saved: Tensor) -> Tensor:
    """A saved state with the columns that were appended since, at zero as in a fresh branch."""
    return functional.pad(saved, (0, max(0, STATE_WIDTH - saved.shape[1])))


def column(state: Tensor, name: str) -> Tensor:
    """The named column ``[n]``, a view."""
    return state[:, _INDEX[name]]


def columns(state: Tensor, first: str, count: int) -> Tensor:
    """``count`` neighbouring columns ``[n, count]`` starting at ``first``, a view."""
    start = _INDEX[first]
    return state[:, start : start + count]


def with_columns(state: Tensor, updates: dict[str, Tensor]) -> Tensor:
    """A copy of ``state`` in which each named column, or block ``[n, k]`` starting there, has its new value."""
    state = state.clone()
    for name, value in updates.items():
        start = _INDEX[name]
        if value.dim() == 1:
            state[:, start] = value
        else:
            state[:, start : start + value.shape[1]] = value
    return state
