"""Learning curves with the moments of growth, against ticks and against training MACs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from esper.lifecycle.stages import Stage
from esper.tracking.figures.history import RunHistory
from esper.tracking.figures.style import LINES, STAGE_COLOURS, tidy

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MACS = "cost/macs"
MARKS = (
    (Stage.GERMINATED.name, "germinated", "v", "#666666"),
    (Stage.FOSSILIZED.name, "kept for good", "s", STAGE_COLOURS[Stage.FOSSILIZED.name]),
    (Stage.CULLED.name, "culled", "X", STAGE_COLOURS[Stage.CULLED.name]),
)
MARKED = 14.0  # points between a panel and its title, for the marks
ALONE = "the host alone"
UNITS = {"loss": "(mean over examples)", "accuracy": "(fraction of examples)"}
FEW = 60  # curves of at most this many points show them


def learning_curves(history: RunHistory) -> Figure | None:
    """Validation metrics above, losses below, those of the host alone dashed; None without any metric."""
    from matplotlib.figure import Figure

    losses = [name for name in history.metrics if name.endswith("/loss") and name.split("/")[0] in ("train", "validation")]
    scores = [name for name in history.metrics if name.startswith("validation/") and name not in losses]
    kinds = [(title, names) for title, names in (("validation", scores), ("loss", losses)) if names]
    if not kinds:
        return None
    costs = history.metrics.get(MACS)
    figure = Figure(figsize=(11 if costs else 6.5, 0.9 + 3.1 * len(kinds)), layout="constrained")
    grid = figure.subplots(len(kinds), 2 if costs else 1, squeeze=False, sharey="row")
    for line, (title, names) in zip(grid, kinds, strict=True):
        _panel(line[0], history, names, None)
        unit = UNITS.get(names[0].rpartition("/")[2], "")
        tidy(line[0], history.ticks, " ".join(filter(None, (title if len(names) > 1 else names[0], unit))), "at the same steps", MARKED)
        if costs:
            _panel(line[1], history, names, costs)
            tidy(line[1], "training MACs (multiply-accumulates)", "", "at the same training MACs", MARKED)
    _legends(figure, grid, history)
    figure.suptitle(f"Learning and growing: {history.title}", fontsize=11, x=0.01, ha="left")
    return figure


def _panel(axes: Any, history: RunHistory, names: list[str], costs: tuple[np.ndarray, np.ndarray] | None) -> None:
    def place(ticks: Any) -> np.ndarray:
        return np.asarray(ticks, float) if costs is None else np.interp(ticks, *costs)

    for index, name in enumerate(names):
        ticks, values = history.metrics[name]
        style = {"marker": "o", "markersize": 3} if len(ticks) <= FEW else {}
        colour = LINES[index % len(LINES)]
        axes.plot(place(ticks), values, color=colour, linewidth=1.6, label=name, **style)
        alone = history.alone.get("same_steps" if costs is None else "same_macs", {}).get(name)
        if alone is not None:
            where = alone[:, 0 if costs is None else 1]
            axes.plot(where, alone[:, 2], color=colour, linewidth=1.4, linestyle="--", label=f"{name}, {ALONE}")
    for stage, _, marker, colour in MARKS:
        at = sorted({tick for tick, target in history.marks if target == stage})
        if at:
            for x in place(at):
                axes.axvline(x, color=colour, linewidth=0.7, alpha=0.45, zorder=0)
            axes.plot(
                place(at),
                np.full(len(at), 1.02),
                marker,
                color=colour,
                markersize=6,
                transform=axes.get_xaxis_transform(),
                clip_on=False,
            )
    axes.set_xlim(0, float(place([max(1, history.last)])[0]))
    if costs is not None:
        from matplotlib.ticker import EngFormatter

        axes.xaxis.set_major_formatter(EngFormatter())


def _legends(figure: Figure, grid: np.ndarray, history: RunHistory) -> None:
    from matplotlib.lines import Line2D

    for line in grid:
        if len(line[0].get_legend_handles_labels()[0]) > 1:
            line[0].legend(fontsize=9, frameon=False)
    seen = {target for _, target in history.marks}
    marks = [
        Line2D([], [], marker=marker, color=colour, linestyle="", label=text) for stage, text, marker, colour in MARKS if stage in seen
    ]
    if marks:
        figure.legend(handles=marks, loc="outside lower center", ncols=3, fontsize=9, frameon=False)
