"""``esper compare runs store=… arm=… pair=… metric=…``: judge runs that esper did not make."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from esper.compare.command import read_words, say_written, writable
from esper.compare.config import CompareConfig
from esper.compare.judging import Judged, direction_of, judge_runs
from esper.compare.plan_store import find_plan, record
from esper.compare.results.registered_plans import Registered
from esper.compare.results.report import show
from esper.compare.sources.open_store import mlflow_uri, opened
from esper.compare.sources.selection import Selection, gather
from esper.errors import UserError

COLUMNS = ("arm", "pair", "metric", "block", "take", "filter", "missing", "names", "run", "step", "cost", "curve")
SETTINGS = ("direction", "reference", "minimum_effect", "alpha", "power", "pooling", "ranking", "figures")
KEYS = ("store", "experiment", *COLUMNS, "plan", "digest", "record", "name", "output", *SETTINGS)
LISTS = ("arm", "block", "cost")
USAGE = """\
usage: esper compare runs store=<source> arm=<column> metric=<column> [pair=<column>] [key=value …]

  store       an MLflow store (sqlite:///….db, its file, http://…), a .csv, .tsv or .parquet table, a CSV export of W&B,
              a trackio project (.db, or its Parquet files), or a folder of TensorBoard's event files
  experiment  experiments of the MLflow store, by name or id: a, or a,b; all where it is left out
  arm         column, or columns a,b, whose values make the arms, as in arm=params.lr
  pair        column that pairs the runs, such as the seed; without it the arms are judged unpaired
  metric      column of the value that is judged
  block       column, or columns, whose values are judged apart and then pooled, such as the task
  take        last, best, or the number of a step: the value at it or the last one before (default: last)
  filter      conditions joined by and, as in "params.model = 'cnn' and metrics.epoch >= 10"
  missing     what an arm that lacks a pair's run does: leave the pair out, count it as lost, or refuse (default: leave)
  names       form of the runs' names, as in '{arm}-seed{seed}'; then arm=name.arm pair=name.seed
  run, step   of a table with a row a step: the column of the run and of the step
  cost        columns of the costs to be shown
  curve       metric whose history the page draws, where it is not the judged one

  plan        a plan that esper compare plan registered: its file, or its name in the MLflow store
  digest      the digest that was printed then, to be checked
  record      true: keep the results in the MLflow store, as a run of their own
  name        name of the results' folder below <output>/compare (default: from metric and arm)
  output      folder of all outputs (default: outputs)

  direction   max or min, where the metric's name does not say which way is better
  reference, minimum_effect, alpha, power, pooling, ranking, figures: as of a sweep; docs/comparing.md"""


def main(arguments: Sequence[str]) -> int:
    """Print the verdicts and write the results; exit code 0."""
    if {"--help", "-h"} & set(arguments) or not arguments:
        print(USAGE, flush=True)
        return 0
    given = read_words(arguments, "esper compare runs", KEYS, SETTINGS)
    store = given.pop("store", "")
    if not store:
        raise UserError("esper compare runs needs store=…: the MLflow store, export, folder or table with the runs.")
    uri = mlflow_uri_for(store, given)
    registered, altered = find_plan(given["plan"], uri, given.get("digest", "")) if "plan" in given else (None, [])
    chosen = selection_from(given, registered)
    config = CompareConfig(**{key: given[key] for key in SETTINGS if key in given})
    folder = writable(Path(given.get("output", "outputs")) / "compare" / folder_name(given, chosen))
    with opened(store, several(given.get("experiment", "")), chosen.wanted) as table:
        table.column(chosen.metric, "metric")  # before anything else is asked about it
        direction = registered.plan.direction if registered and config.direction == "auto" else direction_of(config, chosen.metric)
        gathered = gather(table, chosen, direction)
    changed = {key: given[key] for key in SETTINGS if key in given and key != "figures" and given[key] != "auto"}
    judged = judge_runs(gathered, chosen, config, registered, changed)
    if altered:
        comparison = dataclasses.replace(judged.comparison, exploratory=[*altered, *judged.comparison.exploratory])
        judged = dataclasses.replace(judged, comparison=comparison)
    console = Console()
    show(judged.comparison, judged.plan, console)
    files = judged.write(folder, config.figures)
    say_written(files, console)
    if given.get("record") == "true":
        _record(judged, files, uri, given, console)
    return 0


def mlflow_uri_for(store: str, given: Mapping[str, Any]) -> str:
    """The tracking URI of the store, empty for any other source.

    Raises:
        UserError: results are to be recorded where there is no MLflow store.
    """
    uri = mlflow_uri(store)
    word = given.get("record", "false")
    if word not in ("true", "false"):
        raise UserError(f"record={word} is not accepted: it takes true or false.")
    if word == "true" and not uri:
        raise UserError(f"record=true keeps the results in an MLflow store, and {store} is none; leave it out.")
    return uri


def several(text: str) -> tuple[str, ...]:
    """The words of a list that commas separate."""
    return tuple(word.strip() for word in text.split(",") if word.strip())


def selection_from(given: Mapping[str, Any], registered: Registered | None) -> Selection:
    """The columns that were given, and those of the plan where it has one and nothing else was said."""
    values: dict[str, Any] = {"arm": (), "metric": ""}
    if registered is not None:
        values |= {key: tuple(value) if key in LISTS else value for key, value in registered.selection.items()}
    return Selection(**values | {key: several(given[key]) if key in LISTS else given[key] for key in COLUMNS if key in given})


def folder_name(given: Mapping[str, Any], chosen: Selection) -> str:
    """The name of the results, without what a path cannot have."""
    asked = given.get("name") or Path(given.get("plan", "")).name.removesuffix(".json") or f"{chosen.metric} by {' '.join(chosen.arm)}"
    return re.sub(r"[^\w.=-]+", "-", asked).strip("-.") or "runs"


def _record(judged: Judged, files: Sequence[Path], uri: str, given: Mapping[str, Any], console: Console) -> None:
    run = record(judged.comparison, judged.plan, files, uri, given.get("plan", ""), several(given.get("experiment", "")))
    console.print(f"recorded in the store as run {run}", highlight=False)
