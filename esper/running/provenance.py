"""What a run's numbers depend on besides its configuration: data, versions, machine, threads, git state.

``environment`` collects all of it. A run's folder keeps it in ``environments.json`` for each session. A checkpoint keeps the digest of
the data, and those versions that may change the bits of a resumed run.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import esper
from esper.checkpoint import disk
from esper.checkpoint.tree import fitting
from esper.errors import UserError
from esper.report.summary_file import NAME as SUMMARY
from esper.report.summary_file import read_summary
from esper.tasks.base import Task

PACKAGES = (
    *("torch", "triton", "hydra-core", "omegaconf", "mlflow", "redis", "numpy", "pandas", "scikit-learn"),
    *("msgspec", "pyarrow", "safetensors"),
)
#: Environment variables by which libraries choose how they compute.
VARIABLES = (
    *("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_CBWR", "MKL_DYNAMIC", "ATEN_CPU_CAPABILITY"),
    *("CUBLAS_WORKSPACE_CONFIG", "NVIDIA_TF32_OVERRIDE", "CUDA_VISIBLE_DEVICES", "TRITON_INTERPRET"),
)
#: The parts of a checkpoint, as ``Checkpointer`` saves them.
PARTS = ("trainer", "controller", "port", "alerts", "data", "versions")

FILE = "environments.json"

#: ``{"since": steps done before it, "environment": …}``; the environment is None for a session of which nothing was recorded.
Session = dict[str, Any]


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
    """The name of the GPU, or of the processor where ``device`` is the CPU."""
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


@cache
def git_state() -> dict[str, Any]:
    """``{"commit": …, "changed": bool}`` of the checkout esper runs from; an empty commit where it is none.

    Asked once: a process goes on with the code that it has loaded, whatever becomes of the checkout.
    """
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


@cache
def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


# --- the sessions of a run ---------------------------------------------------------------------------------------------------


def note_session(folder: Path, since: int, environment: dict[str, Any]) -> None:
    """A session begins after step ``since``. Entries of earlier sessions beyond that step are removed, since their work is done again."""
    earlier = [session for session in sessions(folder) if session["since"] < since]
    if since and not earlier and disk.checkpoints(folder / disk.FOLDER):  # a fork begins with none of its own
        earlier = [{"since": 0, "environment": _of_summary(folder)}]
    if not earlier or earlier[-1]["environment"] != environment:
        earlier.append({"since": since, "environment": environment})
    temporary = folder / f".{FILE}.tmp"
    temporary.write_text(json.dumps(earlier, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    temporary.replace(folder / FILE)


def sessions(folder: Path) -> list[Session]:
    """The entries, oldest first; none where none were written yet. Raises UserError for a file that is damaged."""
    path = folder / FILE
    if not path.exists():
        return []
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
        found: list[Session] = [{"since": int(session["since"]), "environment": session["environment"]} for session in read]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error}); delete it, and what computed the run before counts as not recorded.") from error
    return found


def _of_summary(folder: Path) -> Any:
    """The environment of the session before, in a folder that is older than this file."""
    return read_summary(folder).get("environment") if (folder / SUMMARY).exists() else None


# --- in a checkpoint ----------------------------------------------------------------------------------------------------------


def provenance(task: Task, device: torch.device) -> dict[str, Any]:
    """``data``, the task's digest, and ``versions`` of packages and processor, as a checkpoint keeps them."""
    return {"data": task.digest, "versions": _versions(device)}


def no_provenance() -> dict[str, Any]:
    """The provenance of a state that a new run begins with: it has no data or versions yet."""
    return {"data": "", "versions": {}}


def refuse_other_data(state: Any, task: Task, folder: Path) -> None:
    """Raise UserError for a state that is not a run's, or that was trained on other data than ``task`` has now."""
    with fitting():
        before = str({part: state[part] for part in PARTS}["data"])
    if before and before != task.digest:
        raise UserError(
            f"The data of task={task.name} are not those that this run was trained on (digest {before[:12]} then, {task.digest[:12]} now), "
            f"so it cannot go on as it began: bring those back, or start a new run from its state with the present ones: fork={folder}."
        )


def other_versions(state: Any, device: torch.device) -> str:
    """A sentence where another version or processor computed the state than would continue from it; empty for the same or unknown ones."""
    now = _versions(device)
    with fitting():
        then = {name: str(state["versions"].get(name, number)) for name, number in now.items()}
    changed = [f"{name} {then[name]}, now {now[name]}" for name in now if then[name] != now[name]]
    if not changed:
        return ""
    return f"what was trained so far was computed by {' and '.join(changed)}: from here on the bits may be others than an undisturbed run's"


def _versions(device: torch.device) -> dict[str, str]:
    return {"esper": esper.__version__, "torch": str(torch.__version__), "the processor": computing(device)}
