"""What a run depends on that no config says: versions, machine, git state."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import esper

PACKAGES = ("torch", "triton", "hydra-core", "omegaconf", "mlflow", "redis", "numpy", "pandas", "scikit-learn")


def environment(device: torch.device) -> dict[str, Any]:
    """Plain values: Python, packages, processor, device, threads, git commit and whether the tree was changed."""
    return {
        "esper": esper.__version__,
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "device": str(device),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else "",
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "git": git_state(),
    }


def git_state() -> dict[str, Any]:
    """``{"commit": …, "changed": bool}`` of the checkout esper runs from; an empty commit where it is none."""
    folder = Path(esper.__file__).resolve().parent.parent
    if not (folder / ".git").exists():
        return {"commit": "", "changed": False}
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        return {"commit": commit, "changed": bool(_git(folder, "status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError):
        return {"commit": "", "changed": False}


def _git(folder: Path, *words: str) -> str:
    done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=10, check=True)
    return done.stdout.strip()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
