"""Seed layer kernels: Triton on a GPU, plain torch everywhere else. The seed layers call ``dispatch.Kernels``."""

from typing import TYPE_CHECKING

from esper.kernels.config import KernelConfig
from esper.lazy_imports import names_of

if TYPE_CHECKING:
    from esper.kernels.dispatch import FAILED, MISMATCH, BranchesOutput, Kernels

CONFIGS: dict[str, type] = {"auto": KernelConfig, "triton": KernelConfig, "torch": KernelConfig}

__all__ = ["CONFIGS", "FAILED", "MISMATCH", "BranchesOutput", "KernelConfig", "Kernels"]

__getattr__ = names_of(__name__, dict.fromkeys(("FAILED", "MISMATCH", "BranchesOutput", "Kernels"), "esper.kernels.dispatch"))
