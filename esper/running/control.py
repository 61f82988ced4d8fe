"""The control: the host alone on the same data, at the same steps and at the same training MACs.

A control depends on less than the run it serves, so it is kept by the hash of what it depends on and made only once. A config
names files and code without their contents: the hash takes in the data, the host's initial weights and the source of custom parts too.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch

import esper
from esper.config import RootConfig, plain
from esper.custom import source_digest
from esper.report.summary import plain as as_json
from esper.running.parts import build_host, build_trainer
from esper.tasks.base import Task
from esper.training.fingerprint import fingerprint

DEPENDS_ON = ("model", "task", "optimizer", "scheduler", "trainer", "seed")


def control(config: RootConfig, task: Task, device: torch.device, steps: int, folder: Path) -> dict[str, Any]:
    """Final metrics, MACs and steps of the host alone after ``steps``; read from ``folder`` where it was made before."""
    key = _key(config, task, device, steps)
    path = folder / f"{key}.json"
    known = _kept(path)
    if known is not None:
        return known
    trainer = build_trainer(_alone(config), task, device, steps=steps)
    outcome = trainer.fit()
    result = {"steps": steps, "macs": trainer.grow.meter.total, "metrics": outcome.final, "key": key}
    folder.mkdir(parents=True, exist_ok=True)
    _keep(path, result)
    return result


def _kept(path: Path) -> dict[str, Any] | None:
    """What was kept there; None where nothing was, or what no longer reads: it is made again."""
    try:
        known: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return known


def _keep(path: Path, result: dict[str, Any]) -> None:
    """Whole or not at all; a sweep's workers may make the same control at the same time."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(as_json(result), indent=2, sort_keys=True) + "\n", encoding="utf-8")
    temporary.replace(path)


def equal_macs_steps(macs: int, control_at_steps: dict[str, Any]) -> int:
    """Steps in which the host alone spends ``macs``, at the price a step had in a control already made."""
    price = control_at_steps["macs"] / control_at_steps["steps"]
    return max(1, round(macs / price))


def _alone(config: RootConfig) -> RootConfig:
    """The same run with nothing that could germinate and next to no telemetry."""
    return dataclasses.replace(config, telemetry=dataclasses.replace(config.telemetry, every=100))


def _key(config: RootConfig, task: Task, device: torch.device, steps: int) -> str:
    tree = plain(config)
    relevant: dict[str, Any] = {name: tree[name] for name in DEPENDS_ON}
    unused = ("steps", "epochs", "control", "profile")
    relevant["trainer"] = {k: v for k, v in relevant["trainer"].items() if k not in unused and not k.startswith("checkpoint_")}
    relevant |= {"steps": steps, "device": device.type, "torch": torch.__version__, "esper": esper.__version__}
    relevant |= {"data": task.digest, "weights": fingerprint(build_host(config, task).state_dict(), ())}
    relevant["sources"] = [source_digest(part.target) for part in (config.model, config.task) if part.name == "custom"]
    return hashlib.sha256(json.dumps(relevant, sort_keys=True).encode()).hexdigest()[:32]
