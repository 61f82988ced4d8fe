"""What a device is told before training."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, torch
from esper.trainer.device import keep_freed_memory
def faults():
    torch.ones(10_000_000)
    began = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.ones(10_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - began
given_back = min(faults() for _ in range(5))
keep_freed_memory()
print(min(faults() for _ in range(5)), given_back)  # the heap takes a few steps to settle
"""


@pytest.mark.usefixtures("processes")
def test_memory_freed_by_a_step_is_not_faulted_in_again() -> None:
    told = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True).stdout
    kept, given_back = map(int, told.split())
    assert platform.libc_ver()[0] != "glibc" or kept < given_back / 2
