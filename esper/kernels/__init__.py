"""Seed layer kernels: Triton on a GPU, plain torch everywhere else. ``dispatch.Kernels`` is what the seed layers call."""

from esper.kernels.config import KernelConfig
from esper.kernels.dispatch import MISMATCH, Grown, Kernels

CONFIGS: dict[str, type] = {"auto": KernelConfig, "triton": KernelConfig, "torch": KernelConfig}

__all__ = ["CONFIGS", "MISMATCH", "Grown", "KernelConfig", "Kernels"]
