"""Refusal of settings that cannot work on this machine, before torch is imported; in doubt, torch decides when the run starts."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from esper.errors import UserError
from esper.kernels.config import refused
from esper.trainer.config import NO_GPU, NO_HALF

#: Files of a driver for a GPU that torch can use on Linux (NVIDIA, NVIDIA's Tegra, ROCm, WSL): without any of them, there is no GPU.
TRACES = ("/proc/driver/nvidia", "/dev/nvidiactl", "/dev/nvhost-gpu", "/dev/nvgpu", "/dev/kfd", "/dev/dxg")


def may_have_gpu() -> bool:
    """Whether torch may find a GPU; False only if it certainly finds none."""
    return sys.platform != "linux" or any(Path(trace).exists() for trace in TRACES)


def refuse_impossible(tree: Any, here: bool) -> None:
    """Raise UserError for a GPU, or a setting that needs one, where there is none.

    ``tree`` is a composed configuration, not yet checked; its runs are made on this machine if ``here`` is true.
    """
    device, precision = tree.trainer.get("device"), tree.trainer.get("precision")
    without = device == "cpu" or (here and not may_have_gpu())
    if device == "cuda" and without:
        raise UserError(NO_GPU)
    if precision == "fp16" and without:
        raise UserError(NO_HALF)
    if tree.kernel.get("name") == "triton" and without and os.environ.get("TRITON_INTERPRET") != "1":
        raise refused("the model is on the CPU" if device == "cpu" else "no CUDA GPU was found")
