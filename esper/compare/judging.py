"""Judging runs that esper did not make: from a DataFrame, or from what any other source gave."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from esper.compare.config import CompareConfig
from esper.compare.results.analysis import analyse
from esper.compare.results.comparison import Comparison
from esper.compare.results.latex import latex
from esper.compare.results.markdown import markdown
from esper.compare.results.plan import Plan, make_plan
from esper.compare.results.registered_plans import Registered, departures
from esper.compare.results.report import show, write_results
from esper.compare.sources.files import own_table
from esper.compare.sources.selection import Gathered, Selection, gather, guessed_direction
from esper.compare.sources.table import canonical
from esper.config import did_you_mean, listing, structure
from esper.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

NO_PLAN = "no plan was registered before the runs"
WIDTH = 100  # of the table as text


@dataclass(frozen=True)
class Judged:
    """The verdicts on some runs, and the ways of showing them; ``print`` shows the tables and sentences."""

    comparison: Comparison
    plan: Plan
    curves: pd.DataFrame | None = None

    @property
    def sentences(self) -> list[str]:
        """One sentence a verdict."""
        return [row.sentence for row in self.comparison.verdicts]

    def __str__(self) -> str:
        from rich.console import Console

        out = StringIO()
        show(self.comparison, self.plan, Console(file=out, width=WIDTH, force_jupyter=False))
        return out.getvalue()

    def markdown(self) -> str:
        """Verdicts, arms and notes in Markdown."""
        return markdown(self.comparison, self.plan)

    def latex(self) -> str:
        """The table of verdicts for LaTeX with the package booktabs."""
        return latex(self.comparison, self.plan)

    def html(self) -> str:
        """A page that stands alone: arms, every pair, intervals against the margin, cost, curves."""
        from esper.compare.results.page import page

        return page(self.comparison, self.plan, self.curves)

    def _repr_html_(self) -> str:
        """What a notebook shows: the page in a frame of its own, so that its styles stay there."""
        from html import escape

        return f'<iframe srcdoc="{escape(self.html())}" style="width:100%;height:900px;border:0"></iframe>'

    def write(self, folder: str | Path, figures: bool = True) -> list[Path]:
        """``comparison.json``, ``.txt``, ``.md``, ``.tex``, ``.html`` and the figures; returns their paths."""
        return write_results(self.comparison, self.plan, Path(folder), figures, self.curves)


def judge(
    frame: pd.DataFrame,
    *,
    arm: str | Sequence[str],
    metric: str,
    pair: str = "",
    block: str | Sequence[str] = (),
    direction: str = "auto",
    reference: str = "",
    minimum_effect: float = 0.01,
    alpha: float = 0.05,
    power: float = 0.8,
    pooling: str = "both",
    ranking: bool = False,
    take: str | int = "last",
    filter: str = "",
    missing: str = "leave",
    names: str = "",
    run: str = "",
    step: str = "",
    cost: str | Sequence[str] = (),
) -> Judged:
    """Judge the runs in a table: which arm is better, by how much, and how sure that is.

    Args:
        frame: a row a run; with ``step``, a row a step of a run.
        arm: column, or columns, whose values make the arms.
        metric: column with the value that is judged.
        pair: column that says which runs belong together, such as the seed; without it the arms are judged unpaired.
        block: column, or columns, whose values are judged apart and then pooled, such as the task.
        direction: ``max`` or ``min``; ``auto`` takes it from the metric's name.
        reference: arm that the others are compared with; empty means the first.
        minimum_effect: smallest difference worth having, in units of the metric; also the margin of equivalence.
        alpha, power: chance of one false "better" among all verdicts; chance of finding ``minimum_effect``.
        pooling: ``both``, ``apart`` or ``pooled``: verdicts on every block, over all of them, or both.
        ranking: also compare every arm with every other.
        take: with ``step``, the ``last`` or ``best`` value of a run, or its value at a step.
        filter: conditions such as ``epochs >= 10 and model = 'cnn'``; other rows are left out.
        missing: an arm that lacks the run of a pair: ``leave`` the pair out, count it as ``lost``, or ``refuse``.
        names: form of the column ``run_name``, as in ``{arm}-seed{seed}``; its parts are columns ``name.arm`` and ``name.seed``.
        run, step: columns that say which rows are one run, and in which order.
        cost: columns with the costs of a run, such as its seconds.

    A column ``status`` (finished, failed, running …) is heeded. A run that failed, or has no finite value, counts as lost.

    Raises:
        UserError: columns that there are not, two runs for one place, nothing to compare.
    """
    chosen = Selection(
        arm=_several(arm), metric=metric, pair=pair, block=_several(block), take=str(take), filter=filter,
        missing=missing, names=names, run=run, step=step, cost=_several(cost),
    )  # fmt: skip
    settings = {"direction": direction, "reference": reference, "minimum_effect": minimum_effect, "alpha": alpha, "power": power}
    settings |= {"pooling": pooling, "ranking": ranking}
    config: CompareConfig = structure(CompareConfig, settings, "")
    if frame.empty:
        raise UserError("The table has no rows; give one with a row a run.")
    table = own_table(frame, "the table")
    table.column(metric, "metric")  # before its direction is asked for
    return judge_runs(gather(table, chosen, direction_of(config, metric)), chosen, config)


def _several(names: str | Sequence[str]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)


def direction_of(config: CompareConfig, metric: str) -> str:
    """``max`` or ``min``, as it was given or as the metric's name says.

    Raises:
        UserError: neither says it.
    """
    found = guessed_direction(metric) if config.direction == "auto" else config.direction
    if not found:
        raise UserError(f"Nothing says whether a larger {metric} is better; set direction=max or direction=min.")
    return found


def arm_named(word: str, arms: Mapping[str, Mapping[str, Any]]) -> str:
    """The arm that a person means by its name or by its value alone.

    Raises:
        UserError: there is no such arm.
    """
    if word in arms:
        return word
    found = [name for name, settings in arms.items() if list(settings.values()) == [canonical(word)]]
    if not found:
        raise UserError(f"There is no arm {word!r}; the arms are {listing(arms)}{did_you_mean(word, arms)}")
    return found[0]


def judge_runs(
    gathered: Gathered,
    chosen: Selection,
    config: CompareConfig,
    registered: Registered | None = None,
    changed: Mapping[str, Any] | None = None,
) -> Judged:
    """The verdicts on the runs of any source, by a registered plan or by one that the runs themselves make.

    Args:
        config: settings of the comparison, for runs without a plan.
        changed: settings in which the analysis departs from the registered plan, by their names.

    Raises:
        UserError: nothing to compare.
    """
    if registered is None:
        comparison = analyse(gathered.runs, used := plan_from(gathered, chosen, config))
        comparison = dataclasses.replace(comparison, exploratory=[NO_PLAN])
    else:
        plan = registered.plan
        gathered = _planned_alone(gathered, plan)
        comparison = analyse(gathered.runs, used := _changed(plan, changed or {}), plan)
        reasons = departures(registered, dataclasses.asdict(chosen), gathered.started)
        comparison = dataclasses.replace(comparison, exploratory=[*comparison.exploratory, *reasons])
        if not gathered.started:
            trust = "The source does not say when the runs began, so nothing shows that the plan came first."
            comparison = dataclasses.replace(comparison, notes=[*comparison.notes, trust])
    return Judged(dataclasses.replace(comparison, notes=[*gathered.notes, *comparison.notes]), used, gathered.curves)


def plan_from(gathered: Gathered, chosen: Selection, config: CompareConfig) -> Plan:
    """The plan that runs make which nobody planned.

    Raises:
        UserError: the runs are all of one arm, or there is no arm of the reference's name.
    """
    if len(gathered.arms) < 2:
        raise UserError(f"A comparison needs at least two arms, and all runs are of one, {listing(gathered.arms)}; choose others by arm=….")
    reference = arm_named(config.reference, gathered.arms) if config.reference else ""
    return make_plan(
        dataclasses.replace(config, reference=reference, metric=""),
        arms=gathered.arms,
        seeds=gathered.seeds,
        blocks=gathered.blocks,
        metric=chosen.metric.removeprefix("metrics.").removeprefix("summary."),
        direction=direction_of(config, chosen.metric),
        paired=gathered.paired,
    )


def _changed(plan: Plan, changed: Mapping[str, Any]) -> Plan:
    """The plan as the analysis uses it."""
    named = {"reference": arm_named(changed["reference"], plan.arms)} if changed.get("reference") else {}
    return dataclasses.replace(plan, **{**changed, **named})


def _planned_alone(gathered: Gathered, plan: Plan) -> Gathered:
    """The runs of the planned arms, blocks and pairs, and a note on others."""
    seeds = set(plan.seeds) if plan.paired else set(range(len(plan.seeds)))
    kept = [run for run in gathered.runs if run.arm in plan.arms and run.block in plan.blocks and run.seed in seeds]
    notes = list(gathered.notes)
    if others := len(gathered.runs) - len(kept):
        notes.append(f"Runs that the plan does not have (other arms, blocks or {plan.unit}) are left out: {others}.")
    ids = {run.id for run in kept}
    started = {run: start for run, start in gathered.started.items() if run in ids}
    return dataclasses.replace(gathered, runs=kept, started=started, notes=notes)
