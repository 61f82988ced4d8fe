"""Figures of a run, drawn from its recorded files alone, so that they can be drawn again at any time."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def figures_of(folder: Path) -> dict[str, Figure]:
    """The figures that the recorded tables in ``folder`` have something for, by name: ``stages``, ``learning`` and ``gates``.

    A run in which nothing germinated has learning curves only.
    """
    from esper.tracking.figures.gate_margins import gate_margins
    from esper.tracking.figures.history import read_history
    from esper.tracking.figures.learning_curves import learning_curves
    from esper.tracking.figures.stage_timeline import stage_timeline

    history = read_history(folder)
    drawn = {"stages": stage_timeline(history), "learning": learning_curves(history), "gates": gate_margins(history)}
    return {name: figure for name, figure in drawn.items() if figure is not None}


def draw_all(folder: Path) -> list[Path]:
    """Draw every figure of ``figures_of`` into ``folder/figures``; their paths."""
    target = folder / "figures"
    target.mkdir(exist_ok=True)
    paths = []
    for name, figure in figures_of(folder).items():
        paths.append(target / f"{name}.png")
        figure.savefig(paths[-1], dpi=130)
    return paths


def drawn(folder: Path) -> list[Path]:
    """The figures of a run that has ended, drawn unless another tracker has drawn them; their paths."""
    paths = sorted((folder / "figures").glob("*.png"))
    recorded = [path.stat().st_mtime for path in folder.glob("*.parquet")]
    if paths and recorded and min(path.stat().st_mtime for path in paths) > max(recorded):
        return paths
    return draw_all(folder)
