"""Which path the seed layers take, and how carefully a new kernel is rolled out."""

from __future__ import annotations

from dataclasses import dataclass

from esper.errors import UserError
from esper.fields import setting


@dataclass
class KernelConfig:
    """``auto`` takes Triton on a GPU and torch elsewhere; ``triton`` and ``torch`` insist."""

    name: str = setting("auto", choices=("auto", "triton", "torch"), help="path of the seed layers")
    canary: float = setting(0.0, low=0.0, high=1.0, help="fraction of ticks that also run the torch reference and compare")
    rollout: float = setting(1.0, low=0.0, high=1.0, help="fraction of sites, chosen by a stable hash of their names, that use the kernels")


def refused(why: str) -> UserError:
    """What is said where ``kernel=triton`` cannot be had."""
    return UserError(f"kernel=triton was asked for, but {why}; use kernel=auto or kernel=torch, or run on a machine with a GPU and Triton.")
