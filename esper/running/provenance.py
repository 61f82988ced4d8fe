"""What the bits of a run come from beside its configuration: its data, and the versions and the processor that computed it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import esper
from esper.checkpoint.tree import fitting
from esper.errors import UserError
from esper.running.environment import computing
from esper.tasks.base import Task

#: What a checkpoint of a run holds, as ``Keeper`` saves it.
PARTS = ("trainer", "controller", "port", "alerts", "data", "versions")


def origin(task: Task, device: torch.device) -> dict[str, Any]:
    """``data``, the task's digest, and ``versions`` of packages and processor: what a checkpoint says of where its numbers came from."""
    return {"data": task.digest, "versions": _versions(device)}


def unknown_origin() -> dict[str, Any]:
    """Of a state that a new run begins with: whatever data and versions that run has are its own."""
    return {"data": "", "versions": {}}


def refuse_other_data(state: Any, task: Task, folder: Path) -> None:
    """Raise UserError for a state that is no run's, or of a run that was trained on other data than ``task`` has now."""
    with fitting():
        before = str({part: state[part] for part in PARTS}["data"])
    if before and before != task.digest:
        raise UserError(
            f"The data of task={task.name} are not those that this run was trained on (digest {before[:12]} then, {task.digest[:12]} now), "
            f"so it cannot go on as it began: bring those back, or start a new run from its state with the present ones: fork={folder}."
        )


def other_versions(state: Any, device: torch.device) -> str:
    """A sentence where another version or processor computed the state than would go on from it, empty for the same or not known ones."""
    now = _versions(device)
    with fitting():
        then = {name: str(state["versions"].get(name, number)) for name, number in now.items()}
    changed = [f"{name} {then[name]}, now {now[name]}" for name in now if then[name] != now[name]]
    if not changed:
        return ""
    return f"what was trained so far was computed by {' and '.join(changed)}: from here on the bits may be others than an undisturbed run's"


def _versions(device: torch.device) -> dict[str, str]:
    return {"esper": esper.__version__, "torch": str(torch.__version__), "the processor": computing(device)}
