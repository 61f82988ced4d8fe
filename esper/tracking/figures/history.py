"""The recorded history of a run, read back from its Parquet files."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from esper.lifecycle.stages import Stage
from esper.tracking.recorded_tables import read_recorded

RESTING = {Stage.DORMANT.name}


@dataclass(frozen=True)
class BranchHistory:
    """One branch from germination on: its stages as ``(stage name, first tick)``, in order."""

    site: str
    seed: int
    generation: int
    blueprint: str
    path: tuple[tuple[str, int], ...]

    @property
    def label(self) -> str:
        """Site and seed (or ``block``), generation from the second on, blueprint."""
        owner = f"seed {self.seed}" if self.seed >= 0 else "block"
        again = f" gen {self.generation}" if self.generation > 1 else ""
        return f"{self.site} · {owner}{again}" + (f" · {self.blueprint}" if self.blueprint else "")


@dataclass(frozen=True)
class RunHistory:
    """The data of the figures. Metrics are ``(ticks, values)`` by name; ``last`` is the last tick of the run.

    ``alone`` has the curves of the host alone, float64 ``[points, 3]`` of tick, training MACs and value by name, at the ``same_steps``
    and at the ``same_macs``. ``title`` says which run this is, ``clock`` how long a tick is.
    """

    branches: list[BranchHistory]
    metrics: dict[str, tuple[np.ndarray, np.ndarray]]
    gates: list[dict[str, Any]]
    last: int
    marks: list[tuple[int, str]] = field(default_factory=list)
    alone: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    title: str = ""
    clock: str = "step"

    @property
    def ticks(self) -> str:
        """The label of an axis of ticks."""
        return f"tick ({'epoch' if self.clock == 'epoch' else 'optimizer step'})"


def read_history(folder: Path) -> RunHistory:
    """Read transitions, gates and metrics; ``seeds.parquet`` is left alone, it may be large."""
    transitions = read_recorded(folder, "transitions").to_pylist()
    gates = read_recorded(folder, "gates").to_pylist()
    metrics = _by_name(read_recorded(folder, "metrics"))
    ticks = [int(one[-1]) for one, _ in metrics.values()] + [row["tick"] for row in transitions + gates]
    marks = [(row["tick"], row["target"]) for row in transitions]
    summary = _json(folder / "summary.json")
    alone = {
        when: {name: np.array(points, float) for name, points in curves.items()}  # None, where a value was no number, becomes NaN
        for when, curves in (summary.get("control_curves") or {}).items()
    }
    named = [str(summary.get("name", folder.name))] + ([f"seed {summary['seed']}"] if "seed" in summary else [])
    return RunHistory(
        _branches(transitions), metrics, gates, max(ticks, default=0), marks, alone, ", ".join(named), _clock(folder / "config.yaml")
    )


def _json(path: Path) -> dict[str, Any]:
    """The contents of the file; empty if it does not exist yet or is only reserved."""
    text = path.read_bytes().strip(b"\0 \n") if path.exists() else b""
    return json.loads(text) if text else {}


def _clock(path: Path) -> str:
    import yaml

    tree = (yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else None) or {}
    return str((tree.get("lifecycle") or {}).get("clock", "step"))


def _by_name(table: Any) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    names = np.asarray(table["name"].to_pylist(), dtype=object)
    ticks, values = table["tick"].to_numpy(), table["value"].to_numpy()
    found = {}
    for name in sorted(set(names)):
        chosen = names == name
        order = np.argsort(ticks[chosen], kind="stable")
        found[name] = (ticks[chosen][order], values[chosen][order])
    return found


def _branches(transitions: list[dict[str, Any]]) -> list[BranchHistory]:
    """Split the transitions of every seed or block into branches, each from the first stage after DORMANT."""
    growing: dict[tuple[str, int, int], dict[str, Any]] = {}
    done: list[dict[str, Any]] = []
    for row in transitions:
        # a block branch has no seed: several may live at one site, told apart by their branch
        key = (row["site"], row["seed"], row["branch"] if row["seed"] < 0 else -1)
        if row["target"] == Stage.GERMINATED.name:
            growing[key] = {**row, "path": []}
            done.append(growing[key])
        if key in growing:
            growing[key]["path"].append((row["target"], row["tick"]))
    return [BranchHistory(one["site"], one["seed"], one["generation"], one["blueprint"], tuple(one["path"])) for one in done]
