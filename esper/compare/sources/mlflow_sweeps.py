"""A sweep of esper's in an MLflow store, read back: its parent run, plan, tuning, jobs and curves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from esper.compare.results.comparison import TuningResult, parse_tuning
from esper.compare.results.mlflow_sweep import (
    ARM,
    BLOCK,
    CURVES,
    KIND,
    MOST_CURVES,
    PLAN,
    PLAN_DIGEST,
    SEED,
    SWEEP,
    TUNED,
    TUNING,
    join_text,
)
from esper.compare.results.plan import Plan, parse_plan
from esper.compare.results.registered_plans import digest_of
from esper.compare.results.runs import GROWTH, Run
from esper.compare.sources.mlflow_reader import MlflowReader, StoredRun
from esper.errors import UserError
from esper.running.control_runs import CONTROLS

if TYPE_CHECKING:
    import pandas as pd


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
    return parent.tags.get(PLAN_DIGEST) == digest_of(join_text(parent.tags, PLAN))


def tuned_of(parent: StoredRun) -> list[TuningResult]:
    """The results of the tuning; empty where nothing was tuned."""
    written = join_text(parent.tags, TUNED)
    return parse_tuning(written) if written else []
