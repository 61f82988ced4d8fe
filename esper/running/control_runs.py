"""Control runs: the host alone on the same data, at the same steps and at the same training MACs.

A control depends on less than the run it serves, so it is made once and stored under the hash of its dependencies. A config names
files and code without their contents: the hash takes in the data, the host's initial weights and the source of custom parts too.
Sweeps ask which controls a run has, so importing this file needs no torch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import esper
from esper.config import RootConfig, plain
from esper.report.summary_file import plain as as_json
from esper.user_code import source_digest

if TYPE_CHECKING:
    import torch
    from torch import nn

    from esper.tasks.base import Task

SAME_STEPS, SAME_MACS = "same_steps", "same_macs"
CONTROLS = (SAME_STEPS, SAME_MACS)
DEPENDS_ON = ("model", "task", "optimizer", "scheduler", "trainer", "seed")
"""Parts of a config that a control depends on."""
UNUSED = ("steps", "epochs", "control", "keep", "profile", "debug")
"""Keys of ``trainer`` that it does not depend on; its steps are part of the key on their own."""
CURVE_POINTS = 50  # of a control's curve that are stored


def controls_of(config: RootConfig) -> tuple[str, ...]:
    """The controls that a run has. A run in which nothing can germinate is its own control, at the same steps and at the same MACs."""
    return () if config.trainer.control is False or config.controller.name == "none" else CONTROLS


def control_run(config: RootConfig, task: Task, device: torch.device, steps: int, folder: Path, weights: bool = False) -> dict[str, Any]:
    """Final and best metrics, curves, MACs and steps of the host alone after ``steps``; read from ``folder`` where it was made before.

    With ``weights`` its tensors are stored too, for ``trained_host``; a control that was stored without them is made again.
    """
    from esper.running.builders import build_trainer

    key = _key(config, task, device, steps)
    path = folder / f"{key}.json"
    known = _read(path, weights)
    if known is not None:
        return known
    trainer = build_trainer(_alone(config), task, device, steps=steps)
    outcome = trainer.fit()
    result = {"steps": steps, "macs": trainer.grow.meter.total, "metrics": outcome.final, "best": outcome.best, "key": key}
    result["curves"] = _curves(outcome.history)
    folder.mkdir(parents=True, exist_ok=True)
    if weights:
        result["weights"] = _write_weights(trainer.grow.export(), folder, key)
    _write(path, result)
    return result


def trained_host(config: RootConfig, task: Task, known: dict[str, Any], folder: Path) -> nn.Module:
    """The host of a control that was made with ``weights``, on the CPU."""
    from safetensors.torch import load_file

    from esper.running.builders import build_host

    host = build_host(config, task)
    host.load_state_dict(load_file(folder / known["weights"]))
    return host


def _read(path: Path, weights: bool) -> dict[str, Any] | None:
    """The control stored there; None if it is missing, unreadable, or lacks the required ``weights``."""
    try:
        known: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return None if "curves" not in known or (weights and not _whole(path.parent, known)) else known


def _curves(history: list[tuple[int, str, float]]) -> dict[str, list[list[float]]]:
    """The points of each validation metric as ``[tick, training MACs, value]``, thinned out evenly; the last is always there."""
    macs = {tick: value for tick, name, value in history if name == "cost/macs"}
    found: dict[str, list[list[float]]] = {}
    for tick, name, value in history:
        if name.startswith("validation/"):
            found.setdefault(name, []).append([tick, macs[tick], value])
    return {name: [points[i] for i in _some(len(points))] for name, points in found.items()}


def _some(number: int) -> list[int]:
    """Indices of at most ``CURVE_POINTS`` evenly spaced points, and of the last."""
    return sorted({*range(0, number, -(-number // CURVE_POINTS)), number - 1})


def _whole(folder: Path, known: dict[str, Any]) -> bool:
    """Whether the tensors of a stored control are intact: their file is named after the hash of its contents."""
    name = str(known.get("weights", ""))
    return bool(name) and (folder / name).is_file() and name.split(".")[1] == _digest((folder / name).read_bytes())


def _write_weights(host: nn.Module, folder: Path, key: str) -> str:
    """Write the tensors of a control beside it; the name of their file."""
    from safetensors.torch import save

    data = save({name: value.detach().cpu().contiguous().clone() for name, value in host.state_dict().items()})
    path = folder / f"{key}.{_digest(data)}.safetensors"
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(data)
    temporary.replace(path)
    return path.name


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]


def _write(path: Path, result: dict[str, Any]) -> None:
    """Whole or not at all; a sweep's workers may make the same control at the same time."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(as_json(result), indent=2, sort_keys=True) + "\n", encoding="utf-8")
    temporary.replace(path)


def equal_macs_steps(macs: int, control_at_steps: dict[str, Any]) -> int:
    """Steps in which the host alone spends ``macs``, at the cost of a step in an earlier control."""
    price: float = control_at_steps["macs"] / control_at_steps["steps"]
    return max(1, round(macs / price))


def one_step(config: RootConfig, task: Task, device: torch.device) -> dict[str, Any]:
    """MACs and steps of the host alone after one step, needed if there is no control at the same steps."""
    from esper.running.builders import build_trainer

    trainer = build_trainer(_alone(config), task, device)
    try:
        trainer.advance()
    finally:
        trainer.batches.close()
    return {"macs": trainer.grow.meter.total, "steps": 1}


def _alone(config: RootConfig) -> RootConfig:
    """The same config with nothing that could germinate and almost no telemetry."""
    return dataclasses.replace(config, telemetry=dataclasses.replace(config.telemetry, every=100))


def _key(config: RootConfig, task: Task, device: torch.device, steps: int) -> str:
    import torch

    from esper.running.builders import build_host
    from esper.trainer.evaluation import fingerprint

    tree = plain(config)
    relevant: dict[str, Any] = {name: tree[name] for name in DEPENDS_ON}
    relevant["trainer"] = {k: v for k, v in relevant["trainer"].items() if k not in UNUSED and not k.startswith("checkpoint_")}
    relevant |= {"steps": steps, "device": device.type, "torch": torch.__version__, "esper": esper.__version__}
    relevant |= {"data": task.digest, "weights": fingerprint(build_host(config, task).state_dict(), ())}
    relevant["sources"] = [source_digest(part.target) for part in (config.model, config.task) if part.name == "custom"]
    return hashlib.sha256(json.dumps(relevant, sort_keys=True).encode()).hexdigest()[:32]
