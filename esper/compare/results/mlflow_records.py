"""A sweep as the MLflow store has it: names of tags and metrics, and reading it back."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from esper.compare.results.plan import Plan, parse_plan
from esper.compare.results.runs import Run
from esper.compare.results.tuning_choice import Tuned, parse
from esper.errors import UserError
from esper.messages import Metrics
from esper.running.control_runs import CONTROLS

if TYPE_CHECKING:
    from mlflow.entities import Run as StoredRun
    from mlflow.tracking import MlflowClient

SWEEP, KIND, ARM, BLOCK, SEED = "esper.sweep", "esper.kind", "arm", "block", "seed"
PLAN, PLAN_DIGEST, TUNED, JOB_ERROR = "esper.plan", "esper.plan_digest", "esper.tuned", "esper.error"
TUNING = "tuning"  # KIND of a run that tuned an arm
PIECE = 4_000  # characters of such a text in one tag; the store takes 5,000
PAGE = 1_000
GROWTH = {"germinations": "germinated", "fossils": "fossilized", "culls": "culled"}


def pieces(text: str, name: str) -> dict[str, str]:
    """A long text as tags, so that a store without its files is enough; nothing for no text."""
    return {f"{name}.{i // PIECE}": text[i : i + PIECE] for i in range(0, len(text), PIECE)}


def joined(tags: Mapping[str, str], name: str) -> str:
    """The text that :func:`pieces` cut; empty where there is none."""
    numbers = sorted(int(tag.removeprefix(f"{name}.")) for tag in tags if tag.startswith(f"{name}."))
    return "".join(tags[f"{name}.{number}"] for number in numbers)


def plan_tags(plan: str) -> dict[str, str]:
    """The plan's text and its SHA-256 as tags; nothing for no plan."""
    return pieces(plan, PLAN) | ({PLAN_DIGEST: _digest(plan)} if plan else {})


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def cost_values(summary: Mapping[str, Any]) -> Metrics:
    """What a run cost, as last metrics of its MLflow run."""
    values = {f"final/cost/{name}": value for name, value in costs_of(summary).items()}
    return Metrics(tick=int(summary.get("ticks") or 0), values=values)


def costs_of(summary: Mapping[str, Any]) -> dict[str, float]:
    """MACs, seconds and parameters from a run's summary, as far as they are there."""
    found = {
        "macs": summary.get("macs"),
        "seconds": (summary.get("seconds") or {}).get("total"),
        "parameters": (summary.get("parameters") or {}).get("after"),
    }
    return {name: float(value) for name, value in found.items() if value is not None}


def run_of_summary(summary: Mapping[str, Any], metric: str, arm: str, block: str, seed: int, id: str) -> Run:
    """A job's ``summary.json`` as a run; its value is the metric on the test set, NaN where it is missing."""
    final = (summary.get("metrics") or {}).get("final") or {}
    value = final.get(f"test/{metric}", final.get(metric))
    counts = summary.get("seeds") or {}
    return Run(
        arm=arm,
        block=block,
        seed=seed,
        value=float("nan") if value is None else float(value),
        status=str(summary.get("status", "FAILED")),
        costs=costs_of(summary),
        growth={name: float(counts[key]) for name, key in GROWTH.items() if key in counts},
        alone=_alone(summary.get("control") or {}, metric),
        id=id,
    )


def _alone(control: Mapping[str, Any], metric: str) -> dict[str, float]:
    """The metric of the controls that were trained, on the test set."""
    return {when: float(value) for when in CONTROLS if (value := (control.get(when) or {}).get(f"test/{metric}")) is not None}


def run_of_store(stored: StoredRun, metric: str) -> Run:
    """A child run as a run; the inverse of what :func:`cost_values` and the tracker wrote."""
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
    """A client of the store at ``uri``; what breaks while it is used becomes a sentence.

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


def children(client: MlflowClient, parent: StoredRun) -> list[StoredRun]:
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
    text, sweep = joined(parent.data.tags, PLAN), parent.data.tags[SWEEP]
    if not text:
        raise UserError(f"Sweep {sweep} has no plan: it had one arm only, so there is nothing to compare.")
    try:
        return parse_plan(text)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"The plan of sweep {sweep} in the store cannot be read ({error}); its tags {PLAN}.… were changed.") from error


def plan_untouched(parent: StoredRun) -> bool:
    """Whether the plan in the store is still the text that was saved before the sweep's first run."""
    return parent.data.tags.get(PLAN_DIGEST) == _digest(joined(parent.data.tags, PLAN))


def tuned_of(parent: StoredRun) -> list[Tuned]:
    """What tuning chose for every arm; empty where nothing was tuned."""
    written = joined(parent.data.tags, TUNED)
    return parse(written) if written else []


def _search(client: MlflowClient, experiments: list[str], query: str) -> list[StoredRun]:
    found, token = [], None
    while True:
        page = client.search_runs(experiments, query, max_results=PAGE, page_token=token)
        found += page
        token = page.token
        if not token:
            return found
