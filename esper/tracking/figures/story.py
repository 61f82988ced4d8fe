"""The recorded story of a run, read back from its Parquet files."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from esper.lifecycle.stages import Stage

RESTING = {Stage.DORMANT.name}


@dataclass(frozen=True)
class Life:
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
class Story:
    """What figures are drawn from. Metrics are ``(ticks, values)`` by name; ``last`` is the last tick of the run."""

    lives: list[Life]
    metrics: dict[str, tuple[np.ndarray, np.ndarray]]
    gates: list[dict[str, Any]]
    last: int
    marks: list[tuple[int, str]] = field(default_factory=list)


def read_story(folder: Path) -> Story:
    """Read transitions, gates and metrics; ``seeds.parquet`` is left alone, it may be large."""
    import pyarrow.parquet as pq

    transitions = pq.read_table(folder / "transitions.parquet").to_pylist()
    gates = pq.read_table(folder / "gates.parquet").to_pylist()
    metrics = _by_name(pq.read_table(folder / "metrics.parquet"))
    ticks = [int(one[-1]) for one, _ in metrics.values()] + [row["tick"] for row in transitions + gates]
    marks = [(row["tick"], row["target"]) for row in transitions]
    return Story(_lives(transitions), metrics, gates, max(ticks, default=0), marks)


def _by_name(table: Any) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    names = np.asarray(table["name"].to_pylist(), dtype=object)
    ticks, values = table["tick"].to_numpy(), table["value"].to_numpy()
    found = {}
    for name in sorted(set(names)):
        chosen = names == name
        order = np.argsort(ticks[chosen], kind="stable")
        found[name] = (ticks[chosen][order], values[chosen][order])
    return found


def _lives(transitions: list[dict[str, Any]]) -> list[Life]:
    """Split the transitions of every seed or block into lives, each from the first stage after DORMANT."""
    open_lives: dict[tuple[str, int, int], dict[str, Any]] = {}
    done: list[dict[str, Any]] = []
    for row in transitions:
        # a block branch has no seed: several may live at one site, told apart by their branch
        key = (row["site"], row["seed"], row["branch"] if row["seed"] < 0 else -1)
        if row["target"] == Stage.GERMINATED.name:
            open_lives[key] = {**row, "path": []}
            done.append(open_lives[key])
        if key in open_lives:
            open_lives[key]["path"].append((row["target"], row["tick"]))
    return [Life(one["site"], one["seed"], one["generation"], one["blueprint"], tuple(one["path"])) for one in done]
