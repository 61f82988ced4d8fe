"""``esper compare sweep=<id or name>``: judge a sweep again, from the store alone."""

from __future__ import annotations

import contextlib
import dataclasses
import sqlite3
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from esper.compare.config import CompareConfig
from esper.compare.results.analysis import analyse
from esper.compare.results.comparison import with_tuned
from esper.compare.results.mlflow_sweep import SWEEP, find_sweep, job_runs, plan_of, plan_untouched, reading, run_of_store, tuned_of
from esper.compare.results.plan import Plan
from esper.compare.results.report import show, write_results
from esper.config import listing, nearest, structure
from esper.errors import UserError
from esper.tracking.config import MlflowConfig, sqlite_file, tracking_uri
from esper.tracking.mlflow_store import check_uri

#: Parts of the plan that an analysis may change, which makes it exploratory.
CHANGEABLE = ("metric", "direction", "minimum_effect", "alpha", "power", "reference", "sequential", "looks", "ranking")
KEYS = ("sweep", "uri", "output", "figures", *CHANGEABLE)
#: Runs that have no end yet: they count neither as finished nor as failed. KILLED is one that Ctrl-C or SIGTERM interrupted.
UNDER_WAY = ("RUNNING", "KILLED")
USAGE = f"""\
usage: esper compare sweep=<id or name> [key=value …]

  sweep    id that the sweep printed, its name in MLflow, or its MLflow run id
  uri      tracking URI of the store; empty: mlflow.db in the folder of output
  output   folder of all outputs, default: outputs; the results go to <output>/compare/<id>
  figures  true or false

These change what was planned, and make the analysis exploratory: {", ".join(CHANGEABLE)}."""


def main(arguments: Sequence[str]) -> int:
    """Print the verdicts; exit code 0. ``fingerprint A B`` compares the bits of two runs instead."""
    if arguments and arguments[0] == "fingerprint":
        from esper.compare.fingerprint import main as compare_bits

        return compare_bits(arguments[1:])
    if {"--help", "-h"} & set(arguments) or not arguments:
        print(USAGE, flush=True)
        return 0
    given = _read(arguments)
    output = given.pop("output", "outputs")
    uri = tracking_uri(MlflowConfig(uri=given.pop("uri", "")), output)
    if "sweep" not in given:
        raise UserError("esper compare needs sweep=<id or name>, which the sweep printed and MLflow shows.")
    _check_there(uri)
    with reading(uri) as client:
        parent = find_sweep(client, given.pop("sweep"))
        folder = _writable(Path(output) / "compare" / parent.data.tags[SWEEP])
        stored = job_runs(client, parent)
    planned = plan_of(parent)
    figures = given.pop("figures", True)
    plan = _changed(planned, given)
    runs = [run_of_store(run, plan.metric) for run in stored if run.info.status not in UNDER_WAY]
    _check_metric(plan.metric, stored)
    comparison = with_tuned(analyse(runs, plan, planned), tuned_of(parent))
    if not plan_untouched(parent):
        edited = "the plan in the store is not the text that was saved before the first run"
        comparison = dataclasses.replace(comparison, exploratory=[edited, *comparison.exploratory])
    console = Console()
    show(comparison, plan, console)
    files = write_results(comparison, plan, folder, figures)
    console.print(f"written: {', '.join(str(path) for path in files)}", soft_wrap=True, highlight=False)
    return 0


def _read(arguments: Sequence[str]) -> dict[str, Any]:
    """Checked values by key.

    Raises:
        UserError: a word that is no ``key=value``, an unknown key, a value that is not accepted.
    """
    import yaml

    given: dict[str, Any] = {}
    for word in arguments:
        key, equals, text = word.partition("=")
        key = key.removeprefix("compare.")
        if not equals or key not in KEYS:
            raise UserError(f"'{word}' is not accepted: esper compare takes {listing(KEYS)}{nearest(key, KEYS)}.")
        try:
            given[key] = text if key in ("sweep", "uri", "output", "metric", "reference") else yaml.safe_load(text)
        except yaml.YAMLError:
            raise UserError(f"'{word}' cannot be read: {key} takes one plain value, as in {key}=0.1 or {key}=true.") from None
    checked = structure(CompareConfig, {k: v for k, v in given.items() if k in (*CHANGEABLE, "figures")}, "compare")
    return {key: getattr(checked, key) if key in (*CHANGEABLE, "figures") else value for key, value in given.items()}


def _check_there(uri: str) -> None:
    """Refuse an address without a store: analysing must not make one, neither a new file nor tables in another program's.

    Raises:
        UserError: there is no store at ``uri``.
    """
    check_uri(uri, "uri", "or name the folder of another with output=…")
    path = sqlite_file(uri)
    if path is None:
        return
    if not path.exists() or not _has_runs(path):
        raise UserError(f"There is no store at {uri}; name one with uri=… or its folder with output=….")


def _has_runs(database: Path) -> bool:
    try:
        with contextlib.closing(sqlite3.connect(f"{database.resolve().as_uri()}?mode=ro", uri=True)) as opened:
            return bool(opened.execute("SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = 'runs'").fetchall())
    except sqlite3.DatabaseError as error:
        raise UserError(f"The store {database} cannot be read ({error}); bring back a copy of it, or name another with uri=….") from error


def _writable(folder: Path) -> Path:
    """The folder, made and tried before the store's runs are read and analysed.

    Raises:
        UserError: nothing can be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(
            f"The results cannot be written to {folder} ({str(error.strerror).lower()}); give another folder: output=…."
        ) from error
    return folder


def _changed(planned: Plan, given: dict[str, Any]) -> Plan:
    """The plan as the analysis uses it."""
    if "direction" in given and given["direction"] == "auto":
        given.pop("direction")
    if "metric" in given and "direction" not in given and given["metric"] != planned.metric:
        if given["metric"] != "loss":
            raise UserError(f"metric={given['metric']} is not the planned {planned.metric}; say also direction=max or min.")
        given["direction"] = "min"
    return dataclasses.replace(planned, **given)


def _check_metric(metric: str, stored: Sequence[Any]) -> None:
    """Refuse a metric that no finished run has.

    Raises:
        UserError: naming those that the runs have.
    """
    names = sorted({name for run in stored if run.info.status == "FINISHED" for name in run.data.metrics})
    if names and not {f"final/test/{metric}", f"final/{metric}"} & set(names):
        known = [name.removeprefix("final/test/") for name in names if name.startswith("final/test/")]
        raise UserError(f"No run of the sweep has the metric {metric!r}; they have {listing(known)}{nearest(metric, known)}.")
