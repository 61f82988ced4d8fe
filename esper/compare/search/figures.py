"""The figures of a search: its course, and quality against what it costs, with the front."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from esper.compare.search.trials import FAILED, MACS, PARAMETERS, PRUNED
from esper.search.study import pareto

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from esper.compare.search.result import SearchResult

POINT, BEST, GONE = "#0072B2", "#D55E00", "#999999"  # Okabe & Ito
LABELS = {PARAMETERS: "parameters at the end", MACS: "training MACs"}


def draw(result: SearchResult, folder: Path) -> list[Path]:
    """Write ``history.png`` and, where two trials finished, ``front.png``; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [_history(result, folder / "history.png")]
    return [*paths, _front(result, folder / "front.png")] if len(result.finished) > 1 else paths


def _history(result: SearchResult, path: Path) -> Path:
    """Every trial's quality in the order of the trials, the best so far, and what a pruned one had reached."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 4.2), layout="constrained")
    axes = figure.add_subplot()
    done = sorted(result.finished, key=lambda one: one.number)
    if done:
        numbers, values = [one.number for one in done], np.array([one.quality for one in done])
        best = np.maximum.accumulate(values) if result.goal.sign > 0 else np.minimum.accumulate(values)
        axes.plot(numbers, values, "o", color=POINT, ms=5, alpha=0.7, lw=0, label="finished")
        axes.step([*numbers, len(result.trials) - 1], [*best, best[-1]], where="post", color=BEST, lw=1.5, label="best so far")
    pruned = [one for one in result.trials if one.state == PRUNED and one.looks]
    if pruned:
        last = [one.looks[max(one.looks)] for one in pruned]
        axes.plot([one.number for one in pruned], last, "x", color=GONE, ms=6, label="ended early, its last value")
    for one in (one for one in result.trials if one.state == FAILED):
        axes.axvline(one.number, color="#B00020", lw=0.6, alpha=0.5, label="failed")
    _finish(axes, f"{result.goal.metric} on validation ({'larger' if result.goal.sign > 0 else 'smaller'} is better)", "trial")
    return _save(figure, path)


def _front(result: SearchResult, path: Path) -> Path:
    """Quality against parameters and against MACs; the front connects the trials that no other beats in both."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.0, 4.2), layout="constrained")
    for at, cost in enumerate((PARAMETERS, MACS)):
        axes = figure.add_subplot(1, 2, at + 1)
        done = [one for one in result.finished if np.isfinite(getattr(one, cost))]
        points = [(one.quality, float(getattr(one, cost))) for one in done]
        front = pareto([(result.goal.sign * quality, paid) for quality, paid in points])
        axes.plot(
            [paid for _, paid in points], [quality for quality, _ in points], "o", color=POINT, ms=5, alpha=0.6, lw=0, label="finished"
        )
        axes.step([points[i][1] for i in front], [points[i][0] for i in front], "D-", where="post", color=BEST, ms=5, lw=1.2, label="front")
        for i in front:
            axes.annotate(str(done[i].number), (points[i][1], points[i][0]), xytext=(4, -10), textcoords="offset points", fontsize=8)
        _finish(axes, f"{result.goal.metric} on validation" if at == 0 else "", LABELS[cost])
    return _save(figure, path)


def _finish(axes: Axes, y: str, x: str) -> None:
    axes.set_ylabel(y)
    axes.set_xlabel(x)
    axes.grid(alpha=0.25, lw=0.5)
    axes.margins(x=0.06)
    handles, names = axes.get_legend_handles_labels()
    unique = dict(zip(names, handles, strict=True))
    axes.legend(unique.values(), unique.keys(), fontsize=8, frameon=False)


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=140, metadata={"Software": None})
    return path
