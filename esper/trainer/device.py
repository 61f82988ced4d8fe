"""Device, precision and numerics of a run, decided once and described in words."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils.deterministic

from esper.errors import UserError
from esper.trainer.config import NO_GPU, NO_HALF, TrainerConfig

GRAPHS = 64
"""Graphs that torch may make of a host's code."""
filling: Any = torch.utils.deterministic  # whose setting is a property that type checkers do not see
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_device(config: TrainerConfig) -> torch.device:
    """The device that ``trainer.device`` names; raises UserError for a GPU that is not there."""
    present = torch.cuda.is_available()
    if config.device == "cuda" and not present:
        raise UserError(NO_GPU)
    device = torch.device("cuda", torch.cuda.current_device()) if present and config.device != "cpu" else torch.device("cpu")
    if config.precision == "fp16" and device.type == "cpu":
        raise UserError(NO_HALF)
    return device


def describe(device: torch.device, config: TrainerConfig) -> str:
    """One line for the user: the device, and whether a GPU is left unused."""
    if device.type == "cuda":
        return f"device: {torch.cuda.get_device_name(device)} (cuda:{device.index}), {config.precision}"
    threads = config.threads or torch.get_num_threads()
    unused = f"; a GPU is present but unused ({torch.cuda.get_device_name(0)})" if torch.cuda.is_available() else ""
    return f"device: cpu, {threads} thread{'s' if threads > 1 else ''}, {config.precision}{unused}"


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether the device's or the CPU's memory was exhausted; torch has an exception class only for the former."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


@contextmanager
def numerics(config: TrainerConfig) -> Iterator[None]:
    """Context in which the config's determinism and number of threads hold; the earlier settings come back afterwards.

    In deterministic mode torch would fill new memory with NaN, to reveal reads of it. This is switched off, because it
    costs one more kernel for nearly every tensor. A compiler would choose among kernels by their speed, which differs from run to
    run, and so may their sums; it is told not to.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.get_num_threads(), filling.fill_uninitialized_memory
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it first starts
    torch.use_deterministic_algorithms(config.deterministic)
    filling.fill_uninitialized_memory = False
    if config.threads:
        torch.set_num_threads(config.threads)
    try:
        with torch.autograd.set_detect_anomaly(config.detect_anomaly), _compiler_settings(config):
            yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.set_num_threads(before[1])
        filling.fill_uninitialized_memory = before[2]


@contextmanager
def _compiler_settings(config: TrainerConfig) -> Iterator[None]:
    """Within: ``torch.compile`` makes the same kernels in every run, if that is wanted, and a host may grow more than three blocks.

    Torch compiles a piece of code eight times, and then runs it uncompiled; every grown block takes two.
    """
    if not config.compile:
        yield
        return
    from torch._dynamo import config as frontend
    from torch._inductor import config as compiler

    with compiler.patch(deterministic=config.deterministic), frontend.patch(recompile_limit=GRAPHS):
        yield


def keep_freed_memory() -> None:
    """Have glibc's malloc keep the memory that one step frees for the next, instead of returning it to the system in between.

    A page that went back to the system is zeroed and faulted in at its next use, with glibc's default thresholds
    (``mallopt(3)``, M_TRIM_THRESHOLD and M_MMAP_THRESHOLD) thousands of times a step. Other C libraries are left as they are.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: bytes free at the top before they are given back
        mallopt(-3, 2**30)  # M_MMAP_THRESHOLD: bytes from which a block gets a mapping of its own
