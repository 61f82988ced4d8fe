"""Figures of a run, drawn from its recorded files alone, so that they can be drawn again at any time."""

from __future__ import annotations

from pathlib import Path


def draw_all(folder: Path) -> list[Path]:
    """Draw every figure that the Parquet files in ``folder`` have something for, into ``folder/figures``; their paths.

    A run in which nothing germinated has learning curves only.
    """
    from esper.tracking.figures.gate_margins import gate_margins
    from esper.tracking.figures.history import read_history
    from esper.tracking.figures.learning_curves import learning_curves
    from esper.tracking.figures.stage_timeline import stage_timeline

    history = read_history(folder)
    target = folder / "figures"
    target.mkdir(exist_ok=True)
    drawn = []
    for name, draw in (("stages", stage_timeline), ("learning", learning_curves), ("gates", gate_margins)):
        figure = draw(history)
        if figure is not None:
            figure.savefig(target / f"{name}.png", dpi=130)
            drawn.append(target / f"{name}.png")
    return drawn
