"""The control: the host alone on the same data, at the same steps and at the same training MACs.

A control depends on less than the run it serves, so it is kept by the hash of what it depends on and made only once.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from esper.config import RootConfig, plain
from esper.report.summary import plain as as_json
from esper.running.parts import build_trainer
from esper.tasks.base import Task

DEPENDS_ON = ("model", "task", "optimizer", "scheduler", "trainer", "seed")


def control(config: RootConfig, task: Task, device: torch.device, steps: int, folder: Path) -> dict[str, Any]:
    """Final metrics, MACs and steps of the host alone after ``steps``; read from ``folder`` where it was made before."""
    key = _key(config, device, steps)
    path = folder / f"{key}.json"
    if path.exists():
        known: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return known
    trainer = build_trainer(_alone(config), task, device, steps=steps)
    outcome = trainer.fit()
    result = {"steps": steps, "macs": trainer.grow.meter.total, "metrics": outcome.final, "key": key}
    folder.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(as_json(result), indent=2, sort_keys=True) + "\n", encoding="utf-8")
    temporary.replace(path)
    return result


def equal_macs_steps(macs: int, control_at_steps: dict[str, Any]) -> int:
    """Steps in which the host alone spends ``macs``, at the price a step had in a control already made."""
    price = control_at_steps["macs"] / control_at_steps["steps"]
    return max(1, round(macs / price))


def _alone(config: RootConfig) -> RootConfig:
    """The same run with nothing that could germinate and next to no telemetry."""
    return dataclasses.replace(config, telemetry=dataclasses.replace(config.telemetry, every=100))


def _key(config: RootConfig, device: torch.device, steps: int) -> str:
    tree = plain(config)
    relevant: dict[str, Any] = {name: tree[name] for name in DEPENDS_ON}
    unused = ("steps", "epochs", "control", "profile")
    relevant["trainer"] = {k: v for k, v in relevant["trainer"].items() if k not in unused and not k.startswith("checkpoint_")}
    relevant |= {"steps": steps, "device": device.type, "torch": torch.__version__}
    return hashlib.sha256(json.dumps(relevant, sort_keys=True).encode()).hexdigest()[:32]
