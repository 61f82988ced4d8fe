"""Two figures of a comparison: every pair's difference, and quality against training MACs."""

from __future__ import annotations

from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING

import numpy as np

from esper.compare.results.comparison import ArmResult, Comparison, Judgement
from esper.compare.results.plan import Plan
from esper.compare.results.runs import POOLED
from esper.compare.results.sentences import confidence, counted_runs, task_and_model, verdict_word
from esper.compare.statistics.random_draws import generator

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31", "#555555")  # Okabe & Ito
SIDES = {"B better": "#009E73", "A better": "#D55E00", "equivalent": "#0072B2", "inconclusive": "#777777"}


def draw(comparison: Comparison, plan: Plan, folder: Path) -> list[Path]:
    """Write the figures that the data allow into ``folder``; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [draw_pairs(comparison, plan, folder / "pairs.png")]
    costly = [block for block in plan.blocks if any("macs" in arm.cost_points for arm in comparison.arms if arm.block == block)]
    paths += [draw_cost(comparison, plan, block, folder / _name(block)) for block in costly]
    return paths


def _name(block: str) -> str:
    safe = "".join(c if c.isalnum() else "-" for c in block).strip("-")
    return f"cost-{safe}.png" if safe else "cost.png"


def draw_pairs(comparison: Comparison, plan: Plan, path: Path) -> Path:
    """One row a comparison: every pair's point, the mean with the intervals that the tests are, the margin as a band."""
    from matplotlib.figure import Figure

    rows = comparison.verdicts
    figure = Figure(figsize=(8.0, 2.3 + 0.75 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    margin = plan.minimum_effect
    axes.axvspan(-margin, margin, color="#000000", alpha=0.07, lw=0, label=f"±{margin:g}, not worth having")
    axes.axvline(0, color="#333333", lw=0.8)
    for at, row in enumerate(rows):
        _row(axes, row, at)
    axes.set_yticks(range(len(rows)), ["\n".join(_lines(name) for name in (_couple(row, plan), row.block) if name) for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)  # first on top, as in the table
    words = f"difference in {plan.metric} to {plan.others}, positive is better (diamond: mean)"
    figure.supxlabel(fill(words, 100), fontsize=10)  # below the names too: that of the reference may be long
    axes.set_title(_title(plan, plan.blocks[0] if len(plan.blocks) == 1 else POOLED), fontsize=10)
    handles, names = axes.get_legend_handles_labels()
    unique = dict(zip(names, handles, strict=True))
    figure.legend(unique.values(), unique.keys(), loc="outside upper left", fontsize=8, frameon=False)
    if comparison.exploratory:
        figure.text(0.99, 0.99, "exploratory", ha="right", va="top", fontsize=9, color="#B00020")
    return _save(figure, path)


def _couple(row: Judgement, plan: Plan) -> str:
    return row.arm if row.reference == plan.reference else f"{row.arm} − {row.reference}"


def _row(axes: Axes, row: Judgement, at: int) -> None:
    """The points of one comparison, its intervals, and in words its verdict, pairs and level."""
    colour, spread = SIDES[row.verdict], generator("jitter", at).uniform(-0.18, 0.18, len(row.points))
    points, done = np.array(row.points), np.array(row.finished)
    axes.scatter(points[done], at + spread[done], s=18, color=colour, alpha=0.55, lw=0)
    failed = "a run failed" if (~done).any() else None
    axes.scatter(points[~done], at + spread[~done], s=26, marker="x", color="#B00020", label=failed)
    told = f"{verdict_word(row)}, {counted_runs(row)}, no interval"
    if np.isfinite(row.interval).all():
        axes.plot(row.interval, (at, at), color=colour, lw=1.4, label="thin: test for a difference, sure where it leaves out 0")
        told = f"{verdict_word(row)}, {counted_runs(row)}, {confidence(row.level)}"
    if np.isfinite(row.equivalence_interval).all():
        label = "thick: test for equivalence, sure where it stays within the band"
        axes.plot(row.equivalence_interval, (at, at), color=colour, lw=4.0, alpha=0.55, solid_capstyle="butt", label=label)
    axes.plot(row.difference, at, "D", color=colour, ms=6, mec="white", mew=0.8)
    axes.annotate(told, (0.99, at - 0.22), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8, color=colour)


def _title(plan: Plan, block: str) -> str:
    """The metric, the task and the model."""
    return fill(f"{plan.metric}{task_and_model(block, plan)}", 90)


def draw_cost(comparison: Comparison, plan: Plan, block: str, path: Path) -> Path:
    """Quality against training MACs: all arms, all seeds, means on top."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 4.6), layout="constrained")
    axes = figure.add_subplot()
    arms = [arm for arm in comparison.arms if arm.block == block and "macs" in arm.cost_points]
    spent = [macs for arm in arms for macs in arm.cost_points["macs"].values()]
    apart = 0.012 * (max(spent) - min(spent))
    for at, arm in enumerate(arms):
        _cloud(axes, arm, COLOURS[at % len(COLOURS)], (at - (len(arms) - 1) / 2) * apart)
    axes.set_xlabel("training MACs")
    axes.set_ylabel(f"{plan.metric} ({'larger' if plan.direction == 'max' else 'smaller'} is better)")
    axes.set_title(_title(plan, block), fontsize=10)
    axes.margins(x=0.12)
    axes.grid(alpha=0.25, lw=0.5)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    return _save(figure, path)


def _cloud(axes: Axes, arm: ArmResult, colour: str, aside: float) -> None:
    """One arm: every seed's point and the mean, moved a little aside so that arms of equal cost stay apart."""
    macs = arm.cost_points["macs"]
    at = np.array(list(macs.values())) + aside
    values = np.array([arm.points[seed] for seed in macs])
    axes.scatter(at, values, s=16, color=colour, alpha=0.4, lw=0)
    label = _lines(f"{arm.arm} ({len(values)} runs{f', {arm.failed} failed' if arm.failed else ''})")
    axes.plot(at.mean(), values.mean(), "D", color=colour, ms=8, mec="white", mew=1.0, label=label, zorder=3)


def _lines(name: str) -> str:
    """A long name in several lines, broken between words."""
    return fill(name, 24, break_long_words=False, break_on_hyphens=False)


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=140, metadata={"Software": None})
    return path
