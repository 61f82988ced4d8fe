"""How near every gate was to opening: value minus threshold at each look."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from esper.tracking.figures.story import Story
from esper.tracking.figures.style import LINES, tidy

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAMED = len(LINES)  # more branches than this at a gate share the last colour


def gate_margins(story: Story) -> Figure | None:
    """One panel a gate, open from zero up; None when no gate was asked. What is not finite lies on the floor."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(row["gate"] for row in story.gates))
    if not names:
        return None
    columns = 1 if len(names) == 1 else 2
    lines = -(-len(names) // columns)
    figure = Figure(figsize=(5.6 * columns, 0.9 + 2.6 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False, sharex=True).ravel()
    owners = list(dict.fromkeys(_owner(row) for row in story.gates))
    for name, axes in zip(names, panels, strict=False):
        _panel(axes, [row for row in story.gates if row["gate"] == name], owners, name)
        axes.set_xlim(0, max(1, story.last))
    for axes in panels[len(names) :]:
        axes.set_visible(False)
    for axes in panels[max(0, len(names) - columns) : len(names)]:
        axes.set_xlabel("tick", fontsize=10)
        axes.tick_params(labelbottom=True)
    _legend(figure, owners)
    figure.suptitle(
        "Margin of every gate: value − threshold, open from 0 up (branches asked at one tick stand side by side)",
        fontsize=11,
        x=0.01,
        ha="left",
    )
    return figure


def _owner(row: dict[str, Any]) -> str:
    return f"{row['site']} · " + (f"seed {row['seed']}" if row["seed"] >= 0 else f"block {row['branch']}")


def _panel(axes: Any, asked: list[dict[str, Any]], owners: list[str], title: str) -> None:
    margins = np.array([row["value"] - row["threshold"] for row in asked], float)
    finite = margins[np.isfinite(margins)]
    floor = min(0.0, finite.min(initial=0.0)) - 0.05 * (np.ptp(finite) if len(finite) else 1.0)
    present = list(dict.fromkeys(_owner(row) for row in asked))
    for place, owner in enumerate(present):
        mine = [index for index, row in enumerate(asked) if _owner(row) == owner]
        ticks = np.array([asked[index]["tick"] for index in mine])
        values = np.where(np.isfinite(margins[mine]), margins[mine], floor)
        passed = np.array([asked[index]["passed"] for index in mine])
        colour = LINES[min(owners.index(owner), NAMED - 1)]
        beside = _beside(axes, place - (len(present) - 1) / 2) if len(present) <= NAMED else axes.transData
        axes.plot(ticks, values, color=colour, linewidth=1.0, alpha=0.7, transform=beside)
        axes.plot(ticks[passed], values[passed], "o", color=colour, markersize=5, transform=beside)
        axes.plot(
            ticks[~passed], values[~passed], "o", color=colour, markersize=4, markerfacecolor="white", transform=beside
        )
    axes.axhline(0.0, color="black", linewidth=1.0)
    top = max(0.0, finite.max(initial=0.0))  # by hand: shifted markers do not take part in automatic limits
    room = 0.06 * (top - floor) or 1.0
    axes.set_ylim(floor - room, top + room)
    tidy(axes, "", "margin", title.replace("_", " "))


def _beside(axes: Any, place: float) -> Any:
    """Branches are often asked at one tick: draw them side by side, four points apart, instead of on one another."""
    from matplotlib.transforms import ScaledTranslation

    return axes.transData + ScaledTranslation(place * 4 / 72, 0.0, axes.figure.dpi_scale_trans)


def _legend(figure: Figure, owners: list[str]) -> None:
    from matplotlib.lines import Line2D

    lines = [Line2D([], [], color=LINES[index], label=owner) for index, owner in enumerate(owners[: NAMED - 1])]
    if len(owners) >= NAMED:
        rest = owners[NAMED - 1] if len(owners) == NAMED else f"{len(owners) - NAMED + 1} others"
        lines.append(Line2D([], [], color=LINES[-1], label=rest))
    lines += [
        Line2D([], [], marker="o", color="#555555", linestyle="", label="opened"),
        Line2D([], [], marker="o", color="#555555", markerfacecolor="white", linestyle="", label="stayed shut"),
    ]
    figure.legend(handles=lines, loc="outside lower center", ncols=min(4, len(lines)), fontsize=9, frameon=False)
