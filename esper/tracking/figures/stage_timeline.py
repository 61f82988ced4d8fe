"""The stages of every branch: branches as rows, stages as colours, ticks along x."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from esper.lifecycle.stages import Stage
from esper.tracking.figures.history import RESTING, BranchHistory, RunHistory
from esper.tracking.figures.style import DARK, STAGE_COLOURS, STAGE_LETTERS, readable, tidy

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_ROWS = 40


def stage_timeline(history: RunHistory) -> Figure | None:
    """The figure, None when nothing germinated. Of more than 40 branches the first 40 are shown, and the title says so."""
    from matplotlib.figure import Figure

    branches = history.branches[:MAX_ROWS]
    if not branches:
        return None
    figure = Figure(figsize=(10, 1.9 + 0.34 * len(branches)), layout="constrained")
    axes = figure.subplots()
    for row, branch in enumerate(branches):
        _draw_branch(axes, row, branch, history.last)
    axes.set_yticks(range(len(branches)), [branch.label for branch in branches])
    axes.set_ylim(len(branches) - 0.4, -0.6)
    axes.set_xlim(0, max(1, history.last))
    more = f" (first {MAX_ROWS} of {len(history.branches)})" if len(history.branches) > MAX_ROWS else ""
    tidy(axes, history.ticks, "site · seed · blueprint", f"Stages of every branch{more}: {history.title}")
    axes.grid(False, axis="y")
    _legend(figure, {stage for branch in branches for stage, _ in branch.path})
    return figure


def _draw_branch(axes: Any, row: int, branch: BranchHistory, last: int) -> None:
    ends = [tick for _, tick in branch.path[1:]] + [max(last, branch.path[-1][1])]
    for (stage, start), end in zip(branch.path, ends, strict=True):
        if stage in RESTING:
            continue
        axes.barh(
            row,
            max(end - start, last / 400),
            left=start,
            height=0.72,
            color=STAGE_COLOURS[stage],
            edgecolor="white",
            linewidth=0.6,
        )
        letter = STAGE_LETTERS[stage]
        if end - start > last * 0.013 * len(letter):  # only where it fits
            axes.text(
                (start + end) / 2,
                row,
                letter,
                ha="center",
                va="center",
                fontsize=8,
                color="white" if stage in DARK else "black",
            )


def _legend(figure: Figure, present: set[str]) -> None:
    from matplotlib.patches import Patch

    stages = [stage.name for stage in Stage if stage.name in present and stage.name not in RESTING]
    patches = [Patch(color=STAGE_COLOURS[stage], label=f"{readable(stage)} ({STAGE_LETTERS[stage]})") for stage in stages]
    figure.legend(handles=patches, loc="outside lower center", ncols=min(5, len(patches)), fontsize=9, frameon=False)
