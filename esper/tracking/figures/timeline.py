"""The life of every branch: branches as rows, stages as colours, ticks along x."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from esper.lifecycle.stages import Stage
from esper.tracking.figures.story import RESTING, Life, Story
from esper.tracking.figures.style import DARK, STAGE_COLOURS, STAGE_LETTERS, readable, tidy

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_ROWS = 40


def stage_timeline(story: Story) -> Figure | None:
    """None when nothing germinated. Of more than 40 branches the first 40 are shown, and the title says so."""
    from matplotlib.figure import Figure

    lives = story.lives[:MAX_ROWS]
    if not lives:
        return None
    figure = Figure(figsize=(10, 1.9 + 0.34 * len(lives)), layout="constrained")
    axes = figure.subplots()
    for row, life in enumerate(lives):
        _draw_life(axes, row, life, story.last)
    axes.set_yticks(range(len(lives)), [life.label for life in lives])
    axes.set_ylim(len(lives) - 0.4, -0.6)
    axes.set_xlim(0, max(1, story.last))
    more = f" (first {MAX_ROWS} of {len(story.lives)})" if len(story.lives) > MAX_ROWS else ""
    tidy(axes, story.ticks, "site · seed · blueprint", f"Stages of every branch{more}: {story.title}")
    axes.grid(False, axis="y")
    _legend(figure, {stage for life in lives for stage, _ in life.path})
    return figure


def _draw_life(axes: Any, row: int, life: Life, last: int) -> None:
    ends = [tick for _, tick in life.path[1:]] + [max(last, life.path[-1][1])]
    for (stage, start), end in zip(life.path, ends, strict=True):
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
