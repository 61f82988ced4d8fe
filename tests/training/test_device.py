"""What a device is told before training."""

from __future__ import annotations

import platform
import subprocess
import sys

FAULTS = """
import resource, sys, torch
from esper.training.device import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.ones(10_000_000)
began = faults()
for _ in range(5):
    torch.ones(10_000_000)
print(faults() - began)
"""


def test_memory_freed_by_a_step_is_not_faulted_in_again() -> None:
    counts = {
        how: int(subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True).stdout)
        for how in ("kept", "given back")
    }
    assert platform.libc_ver()[0] != "glibc" or counts["kept"] < counts["given back"] / 2
