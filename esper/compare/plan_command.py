"""``esper compare plan …``: register the plan of a comparison before its first run, in a file or in an MLflow store."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from esper.compare.command import read_words
from esper.compare.config import CompareConfig
from esper.compare.judging import arm_named, direction_of
from esper.compare.plan_store import is_file, keep_plan
from esper.compare.results.plan import make_plan
from esper.compare.results.registered_plans import Registered
from esper.compare.runs_command import COLUMNS, selection_from, several
from esper.compare.sources.open_store import file_uri
from esper.compare.sources.selection import Selection, arms_of_values
from esper.compare.sources.table import canonical
from esper.errors import UserError

SETTINGS = ("direction", "reference", "minimum_effect", "alpha", "power", "spread", "pooling", "ranking", "sequential", "looks", "pilot")
KEYS = ("plan", "store", "experiment", "arms", "pairs", "runs", "blocks", *COLUMNS, *SETTINGS)
RANGE = re.compile(r"range\((\d+),\s*(\d+)\)|(\d+)\.\.(\d+)")
MOST = 100_000
USAGE = """\
usage: esper compare plan plan=<name or file.json> arm=<column> arms=a,b metric=<column> pair=<column> pairs=<values> [key=value …]

  plan        a file, as in plan=lr.json; or a name, and the plan is kept in the MLflow store, as a run
  store       the MLflow store that keeps it, for a plan with a name
  experiment  the experiment of the store that it belongs to (default: esper)
  arms        the values of the column arm that there will be; of several columns, 'lr=0.1 opt=adam,lr=0.3 opt=sgd'
  pairs       the values of the column pair: 0,1,2, 0..14 or range(0,15), which leaves out 15
  runs        instead of pair and pairs: how many runs every arm will have, to be judged unpaired
  blocks      the values of the column block

  arm, metric, pair, block, take, filter, missing, names, run, step, cost: as of esper compare runs
  direction, reference, minimum_effect, alpha, power, spread, pooling, ranking, sequential, looks, pilot: docs/comparing.md

Later: esper compare runs store=… plan=<name or file.json> [digest=<what was printed>]"""


def main(arguments: Sequence[str]) -> int:
    """Say what the runs to come can show, register the plan, and print its digest; exit code 0."""
    if {"--help", "-h"} & set(arguments) or not arguments:
        print(USAGE, flush=True)
        return 0
    given = read_words(arguments, "esper compare plan", KEYS, SETTINGS)
    name = given.get("plan", "")
    if not name:
        raise UserError("esper compare plan needs plan=…: the file or the name under which the plan is kept.")
    store = given.get("store", "")
    if is_file(name) and ("store" in given or "experiment" in given):
        raise UserError(f"plan={name} is a file, which no store keeps; leave store and experiment out, or give the plan a name.")
    uri = "" if is_file(name) or not store else store if "://" in store else file_uri(Path(store))
    registered = made(given)
    console = Console()
    for line in registered.plan.statement():
        console.print(line, highlight=False, soft_wrap=True, markup=False)
    digest = keep_plan(registered, name, uri, given.get("experiment", "esper"))
    console.print(f"registered: {name}, digest {digest}", highlight=False, soft_wrap=True, markup=False)
    if is_file(name):
        hint = "Keep the digest where its date can be shown, in a commit for instance: a file alone does not prove when it was written."
        console.print(hint, highlight=False, soft_wrap=True)
    return 0


def made(given: Mapping[str, Any]) -> Registered:
    """The plan that the words ask for, registered now.

    Raises:
        UserError: arms, pairs or runs that are missing, or that nobody could judge.
    """
    chosen = selection_from(given, None)
    config = CompareConfig(**{key: given[key] for key in SETTINGS if key in given})
    arms = _arms(given, chosen)
    seeds = _seeds(given, chosen)
    if chosen.block and not several(given.get("blocks", "")):
        raise UserError(f"block={','.join(chosen.block)} makes blocks; say which there will be: blocks=a,b.")
    blocks = list(arms_of_values(several(given.get("blocks", "")), chosen.block, "blocks")) if chosen.block else [""]
    plan = make_plan(
        dataclasses.replace(config, reference=arm_named(config.reference, arms) if config.reference else "", metric=""),
        arms=arms,
        seeds=seeds,
        blocks=blocks,
        metric=chosen.metric.removeprefix("metrics.").removeprefix("summary."),
        direction=direction_of(config, chosen.metric),
        paired=bool(chosen.pair),
    )
    return Registered(plan, dataclasses.asdict(chosen), float(int(time.time())))


def _arms(given: Mapping[str, Any], chosen: Selection) -> dict[str, dict[str, Any]]:
    values = several(given.get("arms", ""))
    if len(values) < 2:
        raise UserError(f"Say which arms there will be, two at least: arms=a,b, the values of {','.join(chosen.arm)}.")
    return arms_of_values(values, chosen.arm, "arms")


def _seeds(given: Mapping[str, Any], chosen: Selection) -> list[int | str]:
    """What will pair the runs, or the numbers of unpaired ones."""
    pairs, runs = given.get("pairs", ""), given.get("runs", "")
    if bool(chosen.pair) != bool(pairs) or bool(pairs) == bool(runs):
        raise UserError("Give pair=<column> with pairs=range(0,15), or runs=<number of runs of every arm> where nothing pairs them.")
    if runs:
        if not runs.isdigit() or not 2 <= int(runs) <= MOST:
            raise UserError(f"runs={runs} is not accepted: it takes a whole number of runs from 2 to {MOST}.")
        return list(range(int(runs)))
    if match := RANGE.fullmatch(pairs):
        first, end = (int(part) for part in match.groups() if part is not None)
        end += not pairs.startswith("range")  # 0..14 has its end
        if not 0 < end - first <= MOST:
            raise UserError(f"pairs={pairs} is empty or longer than {MOST}; give a range such as range(0,15).")
        return list(range(first, end))
    found = [canonical(word) for word in several(pairs)]
    whole: list[int | str] = [one for one in found if one is not None]
    return whole if all(isinstance(one, int) for one in whole) else [str(one) for one in whole]
