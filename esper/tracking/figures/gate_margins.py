"""How near every gate was to opening: value minus threshold at each look."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from esper.tracking.figures.history import RunHistory
from esper.tracking.figures.style import LINES, tidy

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MARKERS = ("o", "s", "^", "D", "v", "P", "X")
SIZES = (12, 9.5, 8, 6.5, 5.5, 4.5, 3.5)
UNITS = {"gain": ", loss", "final_gain": ", loss"}  # the other gates compare ratios, which have none
NAMED = len(LINES)  # more branches than this at a gate share the last colour


def gate_margins(history: RunHistory) -> Figure | None:
    """One panel a gate, open from zero up; None when no gate was asked. Values that are not finite lie on the floor.

    Branches are often asked at one tick and lie on one another there: each has a marker of its own shape, the later ones smaller.
    """
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(row["gate"] for row in history.gates))
    if not names:
        return None
    columns = 1 if len(names) == 1 else 2
    lines = -(-len(names) // columns)
    figure = Figure(figsize=(5.6 * columns, 0.9 + 2.6 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False, sharex=True).ravel()
    owners = list(dict.fromkeys(_owner(row) for row in history.gates))
    for name, axes in zip(names, panels, strict=False):
        _panel(axes, [row for row in history.gates if row["gate"] == name], owners, name)
        axes.set_xlim(0, max(1, history.last))
    for axes in panels[len(names) :]:
        axes.set_visible(False)
    for axes in panels[max(0, len(names) - columns) : len(names)]:
        axes.set_xlabel(history.ticks, fontsize=10)
        axes.tick_params(labelbottom=True)
    _legend(figure, owners)
    figure.suptitle(
        f"Margin of every gate, open from 0 up: {history.title}",
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
    for owner in present:
        mine = [index for index, row in enumerate(asked) if _owner(row) == owner]
        ticks = np.array([asked[index]["tick"] for index in mine])
        values = np.where(np.isfinite(margins[mine]), margins[mine], floor)
        passed = np.array([asked[index]["passed"] for index in mine])
        number = min(owners.index(owner), NAMED - 1)
        style: dict[str, Any] = {"color": LINES[number], "marker": MARKERS[number], "linestyle": ""}
        axes.plot(ticks, values, color=LINES[number], linewidth=1.0, alpha=0.7)
        axes.plot(ticks[passed], values[passed], **style, markersize=SIZES[number])
        axes.plot(ticks[~passed], values[~passed], **style, markersize=SIZES[number], markerfacecolor="none")
    axes.axhline(0.0, color="black", linewidth=1.0)
    top = max(0.0, finite.max(initial=0.0))
    room = 0.06 * (top - floor) or 1.0
    axes.set_ylim(floor - room, top + room)
    tidy(axes, "", f"value − threshold{UNITS.get(title, '')}", title.replace("_", " "))


def _legend(figure: Figure, owners: list[str]) -> None:
    from matplotlib.lines import Line2D

    lines = [Line2D([], [], color=LINES[i], marker=MARKERS[i], label=owner) for i, owner in enumerate(owners[: NAMED - 1])]
    if len(owners) >= NAMED:
        rest = owners[NAMED - 1] if len(owners) == NAMED else f"{len(owners) - NAMED + 1} others"
        lines.append(Line2D([], [], color=LINES[-1], marker=MARKERS[-1], label=rest))
    lines += [
        Line2D([], [], marker="o", color="#555555", linestyle="", label="opened"),
        Line2D([], [], marker="o", color="#555555", markerfacecolor="white", linestyle="", label="stayed shut"),
    ]
    figure.legend(handles=lines, loc="outside lower center", ncols=min(4, len(lines)), fontsize=9, frameon=False)
