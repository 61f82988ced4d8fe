"""``esper compare sweep=<id or name>``: judge a sweep again, from the store alone."""

from __future__ import annotations

import dataclasses
import importlib
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from esper.compare.config import CompareConfig
from esper.compare.results.analysis import analyse
from esper.compare.results.comparison import with_tuned
from esper.compare.results.mlflow_sweep import SWEEP
from esper.compare.results.plan import Plan
from esper.compare.results.report import show, write_results
from esper.compare.sources.mlflow_reader import reading
from esper.compare.sources.mlflow_sweeps import find_sweep, job_runs, plan_of, plan_untouched, run_of_store, sweep_curves, tuned_of
from esper.compare.sources.open_store import check_store_there
from esper.config import did_you_mean, listing, structure
from esper.errors import UserError
from esper.tracking.config import MlflowConfig, tracking_uri

#: Parts of the plan that an analysis may change, which makes it exploratory.
CHANGEABLE = ("metric", "direction", "minimum_effect", "alpha", "power", "reference", "sequential", "looks", "ranking", "pooling")
KEYS = ("sweep", "uri", "output", "figures", *CHANGEABLE)
#: Runs that have no end yet: they count neither as finished nor as failed. KILLED is one that Ctrl-C or SIGTERM interrupted.
UNDER_WAY = ("RUNNING", "KILLED")
OTHERS = {"runs": "esper.compare.runs_command", "plan": "esper.compare.plan_command"}
USAGE = f"""\
usage: esper compare sweep=<id or name> [key=value …]   judge a sweep of esper's again
       esper compare runs store=… arm=… metric=… …      judge runs that any program made; esper compare runs --help
       esper compare plan plan=… arm=… arms=… …         register a plan for runs to come; esper compare plan --help

  sweep    id that the sweep printed, its name in MLflow, or its MLflow run id
  uri      tracking URI of the store; empty: mlflow.db in the folder of output
  output   folder of all outputs, default: outputs; the results go to <output>/compare/<id>
  figures  true or false

These change what was planned, and make the analysis exploratory: {", ".join(CHANGEABLE)}."""


def main(arguments: Sequence[str]) -> int:
    """Print the verdicts; exit code 0. A first word of ``OTHERS`` asks for something else."""
    if arguments and arguments[0] in OTHERS:
        other: Callable[[Sequence[str]], int] = importlib.import_module(OTHERS[arguments[0]]).main
        return other(arguments[1:])
    if {"--help", "-h"} & set(arguments) or not arguments:
        print(USAGE, flush=True)
        return 0
    given = read_words(arguments, "esper compare", KEYS, (*CHANGEABLE, "figures"))
    output = given.pop("output", "outputs")
    uri = tracking_uri(MlflowConfig(uri=given.pop("uri", "")), output)
    if "sweep" not in given:
        raise UserError("esper compare needs sweep=<id or name>, which the sweep printed and MLflow shows.")
    check_store_there(uri, "uri")
    with reading(uri) as reader:
        parent = find_sweep(reader, given.pop("sweep"))
        folder = writable(Path(output) / "compare" / parent.tags[SWEEP])
        planned = plan_of(parent)
        figures = given.pop("figures", True)
        plan = _changed(planned, given)
        stored = job_runs(reader, parent)
        _check_metric(plan.metric, stored)
        runs = [run_of_store(run, plan.metric) for run in stored if run.status not in UNDER_WAY]
        curves = sweep_curves(reader, stored, plan.metric)
    comparison = with_tuned(analyse(runs, plan, planned), tuned_of(parent))
    if not plan_untouched(parent):
        edited = "the plan in the store is not the text that was saved before the first run"
        comparison = dataclasses.replace(comparison, exploratory=[edited, *comparison.exploratory])
    console = Console()
    show(comparison, plan, console)
    files = write_results(comparison, plan, folder, figures, curves)
    say_written(files, console)
    return 0


def say_written(files: Sequence[Path], console: Console) -> None:
    """Name the files of the results."""
    console.print(f"written: {', '.join(map(str, files))}", soft_wrap=True, highlight=False, markup=False)


def read_words(arguments: Sequence[str], program: str, keys: Sequence[str], settings: Sequence[str]) -> dict[str, Any]:
    """Checked values by key.

    Args:
        keys: all that the program takes.
        settings: those of them that are settings of :class:`CompareConfig`; the others are texts.

    Raises:
        UserError: a word that is no ``key=value``, an unknown key, a key given twice, a value that is not accepted.
    """
    import yaml

    given: dict[str, Any] = {}
    for word in arguments:
        key, equals, text = word.partition("=")
        key = key.removeprefix("compare.")
        if not equals or key not in keys:
            raise UserError(f"'{word}' is not accepted: {program} takes {listing(keys)}{did_you_mean(key, keys)}")
        if key in given:
            raise UserError(f"{key} is given twice ({given[key]} and {text}); give it once.")
        try:
            given[key] = text if key not in settings or key in ("metric", "reference") else yaml.safe_load(text)
        except yaml.YAMLError:
            raise UserError(f"'{word}' cannot be read: {key} takes one plain value, as in {key}=0.1 or {key}=true.") from None
    checked = structure(CompareConfig, {key: value for key, value in given.items() if key in settings}, "compare")
    return {key: getattr(checked, key) if key in settings else value for key, value in given.items()}


def writable(folder: Path) -> Path:
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
    names = sorted({name for run in stored if run.status == "FINISHED" for name in run.metrics})
    if names and not {f"final/test/{metric}", f"final/{metric}"} & set(names):
        known = [name.removeprefix("final/test/") for name in names if name.startswith("final/test/")]
        raise UserError(f"No run of the sweep has the metric {metric!r}; they have {listing(known)}{did_you_mean(metric, known)}")
