"""The implementation of the seed layers, and the share of ticks at which it is checked; ``esper.feature_flags`` chooses the sites."""

from __future__ import annotations

from dataclasses import dataclass

from esper.errors import UserError
from esper.setting_fields import setting


@dataclass
class KernelConfig:
    """``auto`` takes Triton on a GPU and torch elsewhere; ``triton`` and ``torch`` insist."""

    name: str = setting("auto", choices=("auto", "triton", "torch"), help="path of the seed layers")
    canary: float = setting(0.0, low=0.0, high=1.0, help="fraction of ticks that also run the torch reference and compare")


def refused(why: str) -> UserError:
    """The error where ``kernel=triton`` cannot run."""
    return UserError(f"kernel=triton was asked for, but {why}; use kernel=auto or kernel=torch, or run on a machine with a GPU and Triton.")
