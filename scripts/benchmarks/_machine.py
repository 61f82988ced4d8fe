"""Where something was measured: a benchmark's numbers mean nothing without it."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version

import torch


def machine(*packages: str) -> dict[str, str | int | float]:
    """System, cores, load, threads, and the versions of Python, torch and ``packages``."""
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count() or 0,
        "load": round(os.getloadavg()[0], 1),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: version(name) for name in packages},
    }
