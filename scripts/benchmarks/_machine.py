"""Where something was measured: a benchmark's numbers mean nothing without it."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version

import torch

from esper.errors import UserError


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


def chosen(name: str) -> torch.device:
    """The device that ``--device`` names. Raises UserError for a GPU that is not there."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, but torch sees no GPU here; leave --device out.")
    return torch.device("cuda", 0) if name == "cuda" else torch.device("cpu")
