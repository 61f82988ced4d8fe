"""Where registered plans are kept: a file, or a run of an MLflow store; and where the results of such a plan go."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

from esper.compare.results.comparison import Comparison
from esper.compare.results.mlflow_sweep import KIND, PLAN, PLAN_DIGEST, join_text, plan_tags, verdict_metrics, verdict_tags
from esper.compare.results.plan import Plan
from esper.compare.results.registered_plans import Registered, digest_of, parse_registered, save_registered
from esper.compare.sources.mlflow_reader import StoredRun, reading
from esper.compare.sources.open_store import check_store_there
from esper.config import did_you_mean, listing
from esper.errors import UserError

FILE = ".json"
ALTERED = "the plan is not the text that was registered: its digest is {found}, not {asked}"


def is_file(name: str) -> bool:
    """Whether a plan of this name is a file; any other is a run of the store."""
    return name.endswith(FILE)


def find_plan(name: str, uri: str, digest: str) -> tuple[Registered, list[str]]:
    """A registered plan, and why it is not what was registered; no reasons where it is.

    Args:
        name: path of its file, or its name in the store at ``uri``.
        digest: what was printed when it was registered, or the beginning of it; empty if nobody knows.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    if is_file(name):
        try:
            text, kept = Path(name).read_text(encoding="utf-8"), ""
        except OSError as error:
            raise UserError(f"The plan {name} cannot be read ({str(error.strerror).lower()}); give the path of one: plan=….") from error
    else:
        if not uri:
            raise UserError(
                f"plan={name} names a plan in an MLflow store, and the runs are in none; give the path of its file, plan=….json."
            )
        run = _stored_plan(name, uri)
        text, kept = join_text(run.tags, PLAN), run.tags.get(PLAN_DIGEST, "")
    found = digest_of(text)
    reasons = [ALTERED.format(found=found[:12], asked=asked[:12]) for asked in (digest, kept) if asked and not found.startswith(asked)]
    return parse_registered(text, name), reasons[:1]


def _stored_plan(name: str, uri: str) -> StoredRun:
    check_store_there(uri, "store")
    with reading(uri, "store") as reader:
        plans = reader.runs(list(reader.experiments()), (KIND, "plan"), metrics=[])
    found = [run for run in plans if name in (run.name, run.id)]
    if len(found) != 1:
        names = [run.name for run in plans]
        told = f"{len(found)} plans called {name!r}" if found else f"no plan {name!r}"
        raise UserError(f"The store has {told}; it has {listing(names)}{did_you_mean(name, names)}")
    return found[0]


def keep_plan(registered: Registered, name: str, uri: str, experiment: str) -> str:
    """Register a plan in a file, or as a run of the store; returns its digest.

    Raises:
        UserError: there is one of that name, or the place cannot be written.
    """
    if is_file(name):
        return save_registered(registered, Path(name))
    if not uri:
        raise UserError(f"plan={name} would be a plan in an MLflow store, and store=… names none; give it a file, as in plan={name}.json.")
    from esper.tracking.mlflow_store import experiment_id, quiet_client

    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    client = quiet_client(uri, "store", "or give the plan a file: plan=….json")
    place = experiment_id(client, uri, experiment)
    with reading(uri, "store") as reader:
        if any(run.name == name for run in reader.runs(list(reader.experiments()), (KIND, "plan"), metrics=[])):
            raise UserError(f"The store has a plan {name!r} already, and a plan is never replaced; give this one another name: plan=….")
    text = registered.text()
    tags = {KIND: "plan", **plan_tags(text)}
    run = client.create_run(place, start_time=int(registered.when * 1000), tags=tags, run_name=name)
    client.set_terminated(run.info.run_id)
    return digest_of(text)


def record(comparison: Comparison, plan: Plan, files: Sequence[Path], uri: str, planned: str, experiments: Sequence[str]) -> str:
    """Keep the results in the store: in the run of the registered plan, or in one of their own; returns its id.

    Args:
        planned: the plan's name in the store, or anything else where it is not there.
        experiments: those that the runs were taken from; the results go to the first.

    Raises:
        UserError: the store cannot be written.
    """
    from esper.tracking.mlflow_store import experiment_id, quiet_client

    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    client = quiet_client(uri, "store", "or leave record out")
    if planned and not is_file(planned):
        run = _stored_plan(planned, uri).id
    else:
        known = {one.experiment_id: one.name for one in client.search_experiments()}
        first = experiments[0] if experiments else "esper"
        place = experiment_id(client, uri, known.get(first, first))
        name = f"{plan.metric} by {', '.join(dict.fromkeys(key for settings in plan.arms.values() for key in settings))}"
        run = client.create_run(place, start_time=int(time.time() * 1000), tags={KIND: "verdict"}, run_name=name).info.run_id
    for path in files:
        client.log_artifact(run, str(path), "figures" if path.suffix == ".png" else None)
    for metric, number in verdict_metrics(comparison, plan).items():
        client.log_metric(run, metric, number)
    for tag, text in verdict_tags(comparison, plan).items():
        client.set_tag(run, tag, text)
    client.set_terminated(run)
    return run
