"""A comparison as one HTML page that needs nothing else: text and tables, and figures that answer the mouse.

The figures are drawn by Bokeh, whose script the page holds (1.3 MB); the texts are there without it.
"""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from esper.compare.results.comparison import ArmResult, Comparison, Judgement
from esper.compare.results.figures import COLOURS, SIDES
from esper.compare.results.plan import Plan
from esper.compare.results.sentences import confidence, counted_runs, verdict_word
from esper.compare.results.tables import HEADINGS, Cells, arm_cells, cost_cells, number, overall_cells, title, verdict_cells
from esper.compare.statistics.random_draws import generator

if TYPE_CHECKING:
    import pandas as pd
    from bokeh.model import Model
    from bokeh.plotting import figure as Figure

POINTS = 40_000  # of curves in one page: 0.6 MB
HEIGHT = 340
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1100px; margin: 2em auto; padding: 0 1em; }
h1 { font-size: 1.5em; } h2 { font-size: 1.15em; margin: 2em 0 .5em; }
table { border-collapse: collapse; } .scroll { overflow-x: auto; }
th, td { padding: .2em .8em; border-bottom: 1px solid #ddd; text-align: right; } th.w, td.w { text-align: left; }
.exploratory { color: #B00020; font-weight: 600; } .conclusion { font-weight: 600; } .note { color: #555; }
p.how { color: #555; margin: .2em 0; }
"""


def page(comparison: Comparison, plan: Plan, curves: pd.DataFrame | None = None) -> str:
    """The whole page as text.

    Args:
        curves: histories to draw: columns arm, block, run, step and value.
    """
    from bokeh.embed import components
    from bokeh.resources import Resources

    drawn = list(_figures(comparison, plan, curves))
    script, boxes = components([one for _, _, one in drawn])
    resources = Resources(mode="inline", components=["bokeh"])
    figures = "".join(
        f'<h2>{escape(heading)}</h2><p class="how">{escape(how)}</p>{box}' for (heading, how, _), box in zip(drawn, boxes, strict=True)
    )
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title(plan))}</title>'
        f"<style>{STYLE}</style>{resources.render_js()}</head>\n<body>{_text(comparison, plan)}{figures}{script}</body></html>\n"
    )


def _text(comparison: Comparison, plan: Plan) -> str:
    parts = [f"<h1>{escape(title(plan))}</h1>"]
    if comparison.exploratory:
        parts.append(f'<p class="exploratory">Exploratory: {escape("; ".join(comparison.exploratory))}.</p>')
    parts += [f'<p class="conclusion">{escape(line)}</p>' for line in comparison.conclusion]
    parts.append(_listed([row.sentence for row in comparison.verdicts]))
    parts.append(_table(verdict_cells(comparison)))
    parts.append(f"<h2>Arms</h2>{_table(arm_cells(comparison))}")
    if comparison.overall:
        parts.append(f"<h2>All runs of all blocks (a description, no verdict)</h2>{_table(overall_cells(comparison))}")
    if (costs := cost_cells(comparison)).rows:
        parts.append(f"<h2>{'Cost and growth' if any(arm.growth for arm in comparison.arms) else 'Cost'} of a run</h2>{_table(costs)}")
    if comparison.notes:
        parts.append(f'<h2>Notes</h2><div class="note">{_listed(comparison.notes)}</div>')
    return "".join(parts)


def _listed(lines: list[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>"


def _table(cells: Cells) -> str:
    def row(tag: str, texts: list[str]) -> str:
        marks = [" class=w"] * cells.words + [""] * (len(texts) - cells.words)
        return "<tr>" + "".join(f"<{tag}{mark}>{escape(text)}</{tag}>" for mark, text in zip(marks, texts, strict=True)) + "</tr>"

    return f'<div class="scroll"><table>{row("th", cells.headings)}{"".join(row("td", one) for one in cells.rows)}</table></div>'


def _figures(comparison: Comparison, plan: Plan, curves: pd.DataFrame | None) -> Iterator[tuple[str, str, Model]]:
    """Heading, explanation and figure."""
    what = "pair" if plan.paired else "run of the arm, beside the reference's mean"
    how = f"A point for every {what}; thin line: the test for a difference, sure where it leaves out 0; thick line: the test for "
    how += f"equivalence, sure where it stays within the band of ±{plan.minimum_effect:g}."
    yield "Differences", how, _differences(comparison, plan)
    dots = "A point for every run, a diamond for the mean of each arm."
    for block in plan.blocks:
        arms = [arm for arm in comparison.arms if arm.block == block]
        yield f"Runs{_in(block)}", dots, _runs(arms, plan)
        for name in dict.fromkeys(cost for arm in arms for cost in arm.cost_points):
            yield f"{plan.metric} against {HEADINGS.get(name, name)}{_in(block)}", dots, _cost(arms, plan, name)
        if curves is not None and len(chosen := curves[curves["block"] == block]):
            yield f"Curves{_in(block)}", "A thin line for every run, a thick one for the mean of each arm.", _curves(chosen, plan)
    if comparison.overall:
        bands = "The share of runs that are better than a value, with 95% bootstrap bands."
        yield "Performance profiles", bands, _profiles(comparison, plan)


def _in(block: str) -> str:
    return f", {block}" if block else ""


def _figure(**settings: Any) -> Figure:
    from bokeh.plotting import figure

    drawn = figure(sizing_mode="stretch_width", tools="pan,box_zoom,wheel_zoom,reset,save", active_scroll=None, **settings)
    drawn.toolbar.logo = None
    return drawn


def _short(values: Any) -> Any:
    """Numbers in the half of the room: a page shows seven digits."""
    return np.asarray(values, dtype=np.float32)


def _colour(plan: Plan, arm: str) -> str:
    return COLOURS[list(plan.arms).index(arm) % len(COLOURS)]


def _differences(comparison: Comparison, plan: Plan) -> Figure:
    """One row a comparison: points, intervals, the mean, and the margin as a band."""
    from bokeh.models.annotations import BoxAnnotation, Span

    rows = comparison.verdicts
    names = [" ".join(filter(None, (row.arm, row.block))) for row in rows]
    drawn = _figure(
        height=110 + 70 * len(rows),
        x_axis_label=f"difference in {plan.metric} to {plan.others}, positive is better",
        y_range=(len(rows) - 0.5, -0.5),
    )
    drawn.yaxis.ticker = list(range(len(rows)))
    drawn.yaxis.major_label_overrides = dict(enumerate(names))
    if plan.minimum_effect > 0:
        drawn.add_layout(BoxAnnotation(left=-plan.minimum_effect, right=plan.minimum_effect, fill_color="#000000", fill_alpha=0.07))
    drawn.add_layout(Span(location=0, dimension="height", line_color="#333333"))
    for at, row in enumerate(rows):
        _difference_row(drawn, row, at)
    return drawn


def _difference_row(drawn: Figure, row: Judgement, at: int) -> None:
    from bokeh.models import ColumnDataSource, HoverTool

    colour, aside = SIDES[row.verdict], generator("jitter", at).uniform(-0.18, 0.18, len(row.points))
    done = np.array(row.finished, dtype=bool)
    data: dict[str, Any] = {"x": _short(row.points), "y": _short(at + aside), "pair": list(map(str, row.seeds))}
    data |= {"state": ["" if ok else "a run failed" for ok in done], "colour": [colour if ok else "#B00020" for ok in done]}
    source = ColumnDataSource(data)
    points = drawn.scatter("x", "y", source=source, size=7, color="colour", alpha=0.55)
    tips = [("pair" if row.pairs else "run", "@pair"), ("difference", "@x{+0.000000}"), ("", "@state")]
    drawn.add_tools(HoverTool(renderers=[points], tooltips=tips))
    for ends, width in ((row.interval, 2), (row.equivalence_interval, 7)):
        if np.isfinite(ends).all():
            drawn.line(list(ends), [at, at], color=colour, line_width=width, line_alpha=0.9 if width == 2 else 0.45)
    mean = drawn.scatter([row.difference], [at], marker="diamond", size=14, color=colour, line_color="white")
    level = confidence(row.level) if np.isfinite(row.interval).all() else "no interval"
    told = f"{verdict_word(row)}, {counted_runs(row)}, {level}"
    drawn.add_tools(HoverTool(renderers=[mean], tooltips=f"<b>{escape(told)}</b><br>mean @x{{+0.000000}}"))


def _runs(arms: list[ArmResult], plan: Plan) -> Figure:
    """Every run of every arm."""
    from bokeh.models import ColumnDataSource, HoverTool

    drawn = _figure(height=HEIGHT, x_range=[arm.arm for arm in arms], y_axis_label=plan.metric)
    for arm in arms:
        values = list(arm.points.values())
        places = [(arm.arm, float(aside)) for aside in generator(f"places {arm.arm}").uniform(-0.15, 0.15, len(values))]
        data: dict[str, Any] = {"x": places, "y": _short(values), "seed": list(map(str, arm.points))}
        source = ColumnDataSource(data)
        points = drawn.scatter("x", "y", source=source, size=7, color=_colour(plan, arm.arm), alpha=0.5)
        drawn.add_tools(
            HoverTool(renderers=[points], tooltips=[("pair" if plan.paired else "run", "@seed"), (plan.metric, "@y{0.000000}")])
        )
        if values:
            drawn.scatter([arm.arm], [arm.mean], marker="diamond", size=15, color=_colour(plan, arm.arm), line_color="white")
    return drawn


def _cost(arms: list[ArmResult], plan: Plan, name: str) -> Figure:
    """Quality against one cost."""
    from bokeh.models import ColumnDataSource, HoverTool

    drawn = _figure(height=HEIGHT, x_axis_label=HEADINGS.get(name, name), y_axis_label=plan.metric)
    for arm in arms:
        costs = arm.cost_points.get(name, {})
        known = [seed for seed in costs if seed in arm.points]
        if not known:
            continue
        x, y = [costs[seed] for seed in known], [arm.points[seed] for seed in known]
        source = ColumnDataSource({"x": np.array(x), "y": _short(y), "seed": list(map(str, known))})
        points = drawn.scatter("x", "y", source=source, size=7, color=_colour(plan, arm.arm), alpha=0.45, legend_label=arm.arm)
        tips = [("arm", arm.arm.replace("@", "")), ("pair" if plan.paired else "run", "@seed"), (name, "@x"), (plan.metric, "@y{0.000000}")]
        drawn.add_tools(HoverTool(renderers=[points], tooltips=tips))
        mean, colour = ([float(np.mean(x))], [float(np.mean(y))]), _colour(plan, arm.arm)
        drawn.scatter(*mean, marker="diamond", size=15, color=colour, line_color="white", legend_label=arm.arm)
    _legend(drawn)
    return drawn


def _legend(drawn: Figure) -> None:
    """The legend beside the figure; a click hides an arm."""
    if drawn.legend:
        drawn.legend.click_policy = "hide"
        drawn.add_layout(drawn.legend[0], "right")


def _curves(curves: pd.DataFrame, plan: Plan) -> Figure:
    """Every run's history, thinned, and the mean of each arm at the steps that most of its runs have."""
    drawn = _figure(height=HEIGHT + 60, x_axis_label="step", y_axis_label=plan.metric)
    most = max(POINTS // max(curves["run"].nunique(), 1), 10)
    for arm in plan.arms:
        mine = curves[curves["arm"] == arm].sort_values("step", kind="stable")
        xs, ys = [], []
        for _, run in mine.groupby("run", sort=False):
            kept = np.unique(np.linspace(0, len(run) - 1, min(most, len(run))).astype(int))
            xs.append(run["step"].to_numpy(dtype=float)[kept])
            ys.append(_short(run["value"].to_numpy(dtype=float)[kept]))
        if not xs:
            continue
        colour = _colour(plan, arm)
        drawn.multi_line(xs, ys, color=colour, alpha=0.25, line_width=1, legend_label=arm)
        grouped = mine.groupby("step")["value"].agg(["mean", "size"])
        shared = grouped[grouped["size"] * 2 > len(xs)]
        drawn.line(shared.index.to_numpy(dtype=float), shared["mean"].to_numpy(), color=colour, line_width=3, legend_label=arm)
    _legend(drawn)
    return drawn


def _profiles(comparison: Comparison, plan: Plan) -> Figure:
    """The share of runs above each threshold."""
    drawn = _figure(height=HEIGHT, x_axis_label=plan.metric, y_axis_label="share of runs that are better", y_range=(-0.02, 1.02))
    for one in comparison.overall:
        at, share, low, high = (list(column) for column in zip(*one.profile, strict=True))
        colour, told = _colour(plan, one.arm), f"{one.arm}, IQM {number(one.iqm)}"
        drawn.varea(at, low, high, color=colour, alpha=0.15, legend_label=told)
        drawn.line(at, share, color=colour, line_width=2, legend_label=told)
    _legend(drawn)
    return drawn
