"""A sweep in the MLflow store: the names of its tags and metrics, the page that shows its verdict, and reading it back."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from esper.compare.results.comparison import Comparison, Judgement, TuningResult, parse_tuning
from esper.compare.results.plan import Plan, parse_plan
from esper.compare.results.runs import GROWTH, Run, costs_of
from esper.errors import UserError
from esper.messages import Metrics
from esper.running.control_runs import CONTROLS
from esper.tracking.mlflow_run import LONGEST_TAG, NOTE_TAG, fitted, legal
from esper.tracking.run_page import MAIN

if TYPE_CHECKING:
    from mlflow.entities import Run as StoredRun
    from mlflow.tracking import MlflowClient

SWEEP, KIND, ARM, BLOCK, SEED = "esper.sweep", "esper.kind", "arm", "block", "seed"
PLAN, PLAN_DIGEST, TUNED, JOB_ERROR = "esper.plan", "esper.plan_digest", "esper.tuned", "esper.error"
TUNING = "tuning"  # KIND of a run that tuned an arm
PIECE = 4_000  # characters of such a text in one tag; the store takes 5,000
PAGE = 1_000
VERDICT = "verdict"


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
    metrics, tags = stored.data.metrics, stored.data.tags
    value = metrics.get(f"final/test/{metric}", metrics.get(f"final/{metric}", math.nan))
    prefix = "final/cost/"
    return Run(
        arm=tags.get(ARM, ""),
        block=tags.get(BLOCK, ""),
        seed=int(tags[SEED]),
        value=value,
        status=stored.info.status,
        costs={name.removeprefix(prefix): number for name, number in metrics.items() if name.startswith(prefix)},
        growth={n: metrics[f"final/seeds/{key}"] for n, key in GROWTH.items() if f"final/seeds/{key}" in metrics},
        alone={when: metrics[key] for when in CONTROLS if (key := f"final/host_alone/{metric}_{when}") in metrics},
        id=stored.info.run_id,
    )


@contextmanager
def reading(uri: str) -> Iterator[MlflowClient]:
    """A client of the store at ``uri``; an error while it is used becomes a sentence.

    A server that is there but does not answer is given up after a minute, where MLflow would try for a quarter of an
    hour; its own environment variables win.

    Raises:
        UserError: the store cannot be read.
    """
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    import requests
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    from esper.tracking.mlflow_store import quiet_client

    try:
        yield quiet_client(uri, "uri", "or name the folder of another with output=…")
    except (MlflowException, SQLAlchemyError, requests.RequestException, ImportError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise UserError(
            f"The store at {uri} cannot be read: {first.rstrip('. ')}; see that it runs, or name another with uri=…."
        ) from error


def find_sweep(client: MlflowClient, sweep: str) -> StoredRun:
    """The parent run of a sweep, by its id, its name or its MLflow run id.

    Raises:
        UserError: there is none, or several have the name.
    """
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    parents = _search(client, experiments, f"tags.`{KIND}` = 'sweep'")
    found = [run for run in parents if sweep in (run.data.tags[SWEEP], run.info.run_id)]
    found = found or [run for run in parents if run.info.run_name == sweep]
    if len(found) > 1:
        ids = ", ".join(run.data.tags[SWEEP] for run in found)
        raise UserError(f"{len(found)} sweeps are called {sweep!r}; name one by its id: {ids}.")
    if not found:
        known = ", ".join(f"{run.data.tags[SWEEP]} ({run.info.run_name})" for run in parents[:8]) or "none"
        raise UserError(f"The store has no sweep {sweep!r}; it has: {known}.")
    return found[0]


def job_runs(client: MlflowClient, parent: StoredRun) -> list[StoredRun]:
    """Child runs of a sweep, the newest attempt of every job; deleted ones are not among them."""
    found = _search(client, [parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'")
    newest: dict[tuple[str, str, str], StoredRun] = {}
    for run in sorted(found, key=lambda run: run.info.start_time):
        tags = run.data.tags
        if SWEEP in tags and tags.get(KIND) != TUNING:
            newest[(tags.get(ARM, ""), tags.get(BLOCK, ""), tags[SEED])] = run
    return list(newest.values())


def plan_of(parent: StoredRun) -> Plan:
    """The plan that was saved before the sweep's first run.

    Raises:
        UserError: the sweep has none (one arm only), or it cannot be read any more.
    """
    text, sweep = join_text(parent.data.tags, PLAN), parent.data.tags[SWEEP]
    if not text:
        raise UserError(f"Sweep {sweep} has no plan: it had one arm only, so there is nothing to compare.")
    try:
        return parse_plan(text)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"The plan of sweep {sweep} in the store cannot be read ({error}); its tags {PLAN}.… were changed.") from error


def plan_untouched(parent: StoredRun) -> bool:
    """Whether the plan in the store is still the text that was saved before the sweep's first run."""
    return parent.data.tags.get(PLAN_DIGEST) == _digest(join_text(parent.data.tags, PLAN))


def tuned_of(parent: StoredRun) -> list[TuningResult]:
    """The results of the tuning; empty where nothing was tuned."""
    written = join_text(parent.data.tags, TUNED)
    return parse_tuning(written) if written else []


def _search(client: MlflowClient, experiments: list[str], query: str) -> list[StoredRun]:
    found: list[StoredRun] = []
    token = None
    while True:
        page = client.search_runs(experiments, query, max_results=PAGE, page_token=token)
        found += page
        token = page.token
        if not token:
            return found


def verdict_description(comparison: Comparison, plan: Plan) -> str:
    """The sentences, the verdicts as a table, and the notes, in Markdown."""
    parts = [f"**Exploratory:** {'; '.join(comparison.exploratory)}."] if comparison.exploratory else []
    parts += [f"**{line}**" for line in comparison.conclusion]
    parts.append("\n".join(f"- {row.sentence}" for row in comparison.verdicts))
    lines = [f"| arm | verdict | {plan.metric}, better by | interval | p | pairs |", "|---|---|---|---|---|---|"]
    for row in comparison.verdicts:
        low, high = row.interval
        cells = (_called(row), row.verdict, f"{row.difference:+.3g}", f"{low:+.2g} … {high:+.2g}", f"{_p(row):.2g}", row.pairs)
        lines.append("| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |")
    parts.append("\n".join(lines))
    parts += [f"- {note}" for note in comparison.notes]
    return fitted("\n\n".join(parts), LONGEST_TAG)


def verdict_tags(comparison: Comparison, plan: Plan) -> dict[str, str]:
    """The description, and ``verdict`` in a word an arm, so that a list of sweeps can be filtered by it."""
    words = [f"{_called(row)}: {row.verdict}" for row in comparison.verdicts]
    said = words[0].rpartition(": ")[2] if len(words) == 1 else "; ".join(words)
    return {NOTE_TAG: verdict_description(comparison, plan), VERDICT: fitted(said, LONGEST_TAG), "reference": plan.reference}


def verdict_metrics(comparison: Comparison, plan: Plan) -> dict[str, float]:
    """``0_main/<arm> effect``, ``… interval_low``, ``… interval_high``, ``… p`` and ``… pairs``; the mean of every arm below ``arm/``.

    The effect is positive where the arm is better than the reference. Numbers that do not exist are left out.
    """
    found: dict[str, float] = {}
    for row in comparison.verdicts:
        values = {"effect": row.difference, "interval_low": row.interval[0], "interval_high": row.interval[1], "p": _p(row)}
        found |= {f"{MAIN}/{_called(row)} {name}": value for name, value in (values | {"pairs": float(row.pairs)}).items()}
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
