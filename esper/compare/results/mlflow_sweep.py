"""A sweep in the MLflow store: the names of its tags and metrics, the page that shows its verdict, and reading it back."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from esper.compare.results.comparison import Comparison, Judgement, TuningResult, parse_tuning
from esper.compare.results.markdown import verdicts
from esper.compare.results.plan import Plan, parse_plan
from esper.compare.results.runs import GROWTH, Run, costs_of
from esper.errors import UserError
from esper.messages import Metrics
from esper.running.control_runs import CONTROLS
from esper.tracking.mlflow_run import LONGEST_TAG, NOTE_TAG, fitted, legal
from esper.tracking.run_page import MAIN

if TYPE_CHECKING:
    import pandas as pd

    from esper.compare.sources.mlflow_reader import MlflowReader, StoredRun

SWEEP, KIND, ARM, BLOCK, SEED = "esper.sweep", "esper.kind", "arm", "block", "seed"
PLAN, PLAN_DIGEST, TUNED, JOB_ERROR = "esper.plan", "esper.plan_digest", "esper.tuned", "esper.error"
TUNING = "tuning"  # KIND of a run that tuned an arm
PIECE = 4_000  # characters of such a text in one tag; the store takes 5,000
VERDICT = "verdict"
CURVES = ["arm", "block", "run", "step", "value"]
MOST_CURVES = 1_000  # of more runs a page shows no curve that could be told from another


def split_text(text: str, name: str) -> dict[str, str]:
    """A long text as tags, so that a store without its files is enough; nothing for no text."""
    return {f"{name}.{i // PIECE}": text[i : i + PIECE] for i in range(0, len(text), PIECE)}


def join_text(tags: Mapping[str, str], name: str) -> str:
    """The text that :func:`split_text` cut; empty where there is none."""
    numbers = sorted(int(tag.removeprefix(f"{name}.")) for tag in tags if tag.startswith(f"{name}."))
    return "".join(tags[f"{name}.{number}"] for number in numbers)


def plan_tags(plan: str) -> dict[str, str]:
    """The plan's text and its SHA-256 as tags; nothing for no plan."""
    return split_text(plan, PLAN) | ({PLAN_DIGEST: _digest(plan)} if plan else {})


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def cost_values(summary: Mapping[str, Any]) -> Metrics:
    """The cost of a run, as last metrics of its MLflow run."""
    values = {f"final/cost/{name}": value for name, value in costs_of(summary).items()}
    return Metrics(tick=int(summary.get("ticks") or 0), values=values)


def run_of_store(stored: StoredRun, metric: str) -> Run:
    """A run from the child run that :func:`cost_values` and the tracker wrote."""
    metrics, tags = stored.metrics, stored.tags
    value = metrics.get(f"final/test/{metric}", metrics.get(f"final/{metric}", math.nan))
    prefix = "final/cost/"
    return Run(
        arm=tags.get(ARM, ""),
        block=tags.get(BLOCK, ""),
        seed=int(tags[SEED]),
        value=value,
        status=stored.status,
        costs={name.removeprefix(prefix): number for name, number in metrics.items() if name.startswith(prefix)},
        growth={n: metrics[f"final/seeds/{key}"] for n, key in GROWTH.items() if f"final/seeds/{key}" in metrics},
        alone={when: metrics[key] for when in CONTROLS if (key := f"final/host_alone/{metric}_{when}") in metrics},
        id=stored.id,
    )


def find_sweep(reader: MlflowReader, sweep: str) -> StoredRun:
    """The parent run of a sweep, by its id, its name or its MLflow run id.

    Raises:
        UserError: there is none, or several have the name.
    """
    parents = reader.runs(list(reader.experiments()), (KIND, "sweep"))
    found = [run for run in parents if sweep in (run.tags[SWEEP], run.id)]
    found = found or [run for run in parents if run.name == sweep]
    if len(found) > 1:
        ids = ", ".join(run.tags[SWEEP] for run in found)
        raise UserError(f"{len(found)} sweeps are called {sweep!r}; name one by its id: {ids}.")
    if not found:
        known = ", ".join(f"{run.tags[SWEEP]} ({run.name})" for run in parents[:8]) or "none"
        raise UserError(f"The store has no sweep {sweep!r}; it has: {known}.")
    return found[0]


def job_runs(reader: MlflowReader, parent: StoredRun) -> list[StoredRun]:
    """Child runs of a sweep, the newest attempt of every job; deleted ones are not among them."""
    found = reader.runs([parent.experiment], ("mlflow.parentRunId", parent.id))
    newest: dict[tuple[str, str, str], StoredRun] = {}
    for run in sorted(found, key=lambda run: run.start or 0):
        if SWEEP in run.tags and run.tags.get(KIND) != TUNING:
            newest[(run.tags.get(ARM, ""), run.tags.get(BLOCK, ""), run.tags[SEED])] = run
    return list(newest.values())


def sweep_curves(reader: MlflowReader, stored: Sequence[StoredRun], metric: str) -> pd.DataFrame | None:
    """The metric on the validation set over the steps of every job; None where the store has none, as for very many runs."""
    import pandas as pd

    places = {run.id: (run.tags.get(ARM, ""), run.tags.get(BLOCK, "")) for run in stored}
    if not places or len(places) > MOST_CURVES:
        return None
    points = reader.history(f"validation/{metric}", list(places))
    rows = [(*places[run], run, step, value) for run, step, value in points if math.isfinite(value)]
    return pd.DataFrame(rows, columns=CURVES) if rows else None


def plan_of(parent: StoredRun) -> Plan:
    """The plan that was saved before the sweep's first run.

    Raises:
        UserError: the sweep has none (one arm only), or it cannot be read any more.
    """
    text, sweep = join_text(parent.tags, PLAN), parent.tags[SWEEP]
    if not text:
        raise UserError(f"Sweep {sweep} has no plan: it had one arm only, so there is nothing to compare.")
    try:
        return parse_plan(text)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"The plan of sweep {sweep} in the store cannot be read ({error}); its tags {PLAN}.… were changed.") from error


def plan_untouched(parent: StoredRun) -> bool:
    """Whether the plan in the store is still the text that was saved before the sweep's first run."""
    return parent.tags.get(PLAN_DIGEST) == _digest(join_text(parent.tags, PLAN))


def tuned_of(parent: StoredRun) -> list[TuningResult]:
    """The results of the tuning; empty where nothing was tuned."""
    written = join_text(parent.tags, TUNED)
    return parse_tuning(written) if written else []


def verdict_description(comparison: Comparison) -> str:
    """The sentences, the verdicts as a table, and the notes, in Markdown."""
    return fitted("\n\n".join(verdicts(comparison)), LONGEST_TAG)


def verdict_tags(comparison: Comparison, plan: Plan) -> dict[str, str]:
    """The description, and ``verdict`` in a word an arm, so that a list of sweeps can be filtered by it."""
    words = [f"{_called(row)}: {row.verdict}" for row in comparison.verdicts]
    said = words[0].rpartition(": ")[2] if len(words) == 1 else "; ".join(words)
    return {NOTE_TAG: verdict_description(comparison), VERDICT: fitted(said, LONGEST_TAG), "reference": plan.reference}


def verdict_metrics(comparison: Comparison, plan: Plan) -> dict[str, float]:
    """``0_main/<arm> effect``, ``… interval_low``, ``… interval_high``, ``… p`` and ``… pairs``; the mean of every arm below ``arm/``.

    The effect is positive where the arm is better than the reference. Where nothing pairs the runs, both arms' runs are counted in the
    place of pairs. Numbers that do not exist are left out.
    """
    found: dict[str, float] = {}
    for row in comparison.verdicts:
        values = {"effect": row.difference, "interval_low": row.interval[0], "interval_high": row.interval[1], "p": _p(row)}
        found |= {
            f"{MAIN}/{_called(row)} {name}": value for name, value in (values | {"pairs": float(row.pairs or sum(row.counts))}).items()
        }
    for arm in comparison.arms:
        found[f"arm/{' '.join(filter(None, (arm.arm, arm.block)))}/{plan.metric}"] = arm.mean
    for one in comparison.tuned:
        found |= one.numbers()
    return {legal(name): value for name, value in found.items() if math.isfinite(value)}


def _called(row: Judgement) -> str:
    return " ".join(filter(None, (row.arm, row.block)))


def _p(row: Judgement) -> float:
    """The p-value, after Holm, that the verdict rests on."""
    return row.p_equivalent if row.verdict == "equivalent" else row.p_holm
