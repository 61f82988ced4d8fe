"""Stages, transitions, ages and gates: pure rules over tensors, no module and no I/O."""

from typing import TYPE_CHECKING, Any

from esper.lifecycle.ages import Ages, resolve
from esper.lifecycle.config import LifecycleConfig
from esper.lifecycle.gates import GATES, passes, spent
from esper.lifecycle.stages import Stage

if TYPE_CHECKING:
    from esper.lifecycle.machine import Change, Machine
    from esper.lifecycle.table import SeedTable

CONFIGS = {"default": LifecycleConfig, "reference": LifecycleConfig}

__all__ = [
    "CONFIGS",
    "GATES",
    "Ages",
    "Change",
    "LifecycleConfig",
    "Machine",
    "SeedTable",
    "Stage",
    "passes",
    "resolve",
    "spent",
]

_WHERE = {"Change": "machine", "Machine": "machine", "SeedTable": "table"}


def __getattr__(name: str) -> Any:
    """The parts that hold tensors are imported when asked for: who only names stages, as a tracker does, need not wait for torch."""
    if name not in _WHERE:
        raise AttributeError(f"module 'esper.lifecycle' has no attribute '{name}'")
    import importlib

    return getattr(importlib.import_module(f"esper.lifecycle.{_WHERE[name]}"), name)
