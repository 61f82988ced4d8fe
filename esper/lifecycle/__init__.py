"""Stages, transitions, ages and gates: pure rules over tensors, no module and no I/O."""

from esper.lifecycle.ages import Ages, resolve
from esper.lifecycle.config import LifecycleConfig
from esper.lifecycle.gates import GATES, passes, spent
from esper.lifecycle.machine import Change, Machine
from esper.lifecycle.stages import Stage
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
