"""What a run depends on that no config says: versions, machine, git state."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import esper

PACKAGES = (
    *("torch", "triton", "hydra-core", "omegaconf", "mlflow", "redis", "numpy", "pandas", "scikit-learn"),
    *("msgspec", "pyarrow", "safetensors"),
)
#: What libraries read from the environment and take another way of computing by.
VARIABLES = (
    *("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_CBWR", "MKL_DYNAMIC", "ATEN_CPU_CAPABILITY"),
    *("CUBLAS_WORKSPACE_CONFIG", "NVIDIA_TF32_OVERRIDE", "CUDA_VISIBLE_DEVICES", "TRITON_INTERPRET"),
)


def environment(device: torch.device) -> dict[str, Any]:
    """Plain values: Python, packages, processor, device, threads, flags, git commit and whether the tree was changed.

    ``constraints`` is the SHA-256 of the checkout's ``constraints.txt``, empty where there is none; of ``VARIABLES`` those that are set
    are told.
    """
    return {
        "esper": esper.__version__,
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "constraints": _constraints(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": {"model": processor(), "capability": torch.backends.cpu.get_cpu_capability()},
        "device": str(device),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else "",
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "flags": {
            "matmul_precision": torch.get_float32_matmul_precision(),
            "cudnn_benchmark": torch.backends.cudnn.benchmark,
            "cudnn_deterministic": torch.backends.cudnn.deterministic,
            "cudnn_tf32": torch.backends.cudnn.allow_tf32,
        },
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "git": git_state(),
    }


def computing(device: torch.device) -> str:
    """What computes on ``device``: the GPU's name, or the processor's."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else processor()


@cache
def processor() -> str:
    """The processor's name and, where Linux tells them, the numbers by which models of one name differ."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor()
    first = info.read_text(encoding="utf-8", errors="replace").split("\n\n", 1)[0]
    told = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}
    numbers = [f"{key} {told[key]}" for key in ("cpu family", "model", "stepping") if key in told]
    name = told.get("model name") or platform.processor() or platform.machine()
    return f"{name} ({', '.join(numbers)})" if numbers else name


def _constraints() -> str:
    path = Path(esper.__file__).resolve().parent.parent / "constraints.txt"
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else ""


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
