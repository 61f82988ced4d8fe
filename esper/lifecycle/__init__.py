"""Stages, transitions, ages and gates: pure rules over tensors, no module and no I/O."""

from typing import TYPE_CHECKING

from esper.lazy_imports import names_of
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

_TABLE, _MACHINE = "esper.lifecycle.table", "esper.lifecycle.machine"
__getattr__ = names_of(__name__, {"Change": _MACHINE, "Machine": _MACHINE, "SeedTable": _TABLE})
