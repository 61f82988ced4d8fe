"""``esper list [key=value …]``: the runs and sweeps of the outputs folder and of its MLflow store."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from esper.errors import UserError
from esper.inventory.entries import SWEEP, Entry
from esper.inventory.filters import UNITS, chosen, read_words
from esper.inventory.folder import entries
from esper.inventory.store import add_stored, store_of
from esper.report.number_format import count, duration, short

USAGE = """\
usage: esper list [key=value …] [--json]   runs and sweeps, the newest first

  kind     run, sweep or job, several as a,b (default: run,sweep; the jobs of sweeps are runs too)
  sweep    the jobs of this sweep: its id or its folder
  status   finished, failed, killed, died, new, running, stopped, damaged or unknown; several as a,b
  name     part of the name or of the folder's name, or a pattern with * and ?
  arm      part of an arm's name, or a pattern
  metric   part of the deciding metric's name, or a pattern
  newer    changed at most that long ago, as in newer=7d (s, m, h, d or w)
  older    changed at least that long ago
  sort     age, name, status, metric, cost or time: newest, largest and dearest first (default: age)
  limit    how many are shown at most

  output   folder of all outputs (default: outputs)
  uri      tracking URI of an MLflow store, read too; empty: mlflow.db in the folder of output; none: the folder alone
  --json   one JSON document: a list of objects

Exit code 0, also where nothing is found."""
COLUMNS = ("NAME", "ARMS", "METRIC", "STATUS", "COST", "TIME", "AGE", "FOLDER")
RIGHT = ("COST", "TIME", "AGE")
NO_STORE = "none"
MOST_ARMS = 4


def main(words: Sequence[str]) -> int:
    """Print the table, or JSON; exit code 0."""
    if {"--help", "-h"} & set(words):
        print(USAGE, flush=True)
        return 0
    as_json = "--json" in words
    given = read_words([word for word in words if word != "--json"], "esper list")
    found = known(given)
    kept = chosen(found, given, time.time())
    if as_json:
        print(json.dumps([plain(entry) for entry in kept], indent=2, allow_nan=False), flush=True)
        return 0
    if not kept:
        place = given.get("output", "outputs")
        hidden = "" if len(found) == 0 else f"; without these words there are {len(found)}, jobs of sweeps included"
        print(f"There is no such run or sweep in {place}{hidden}.", file=sys.stderr)
        return 0
    print("\n".join(lines(kept, time.time())), flush=True)
    return 0


def known(given: Mapping[str, str]) -> list[Entry]:
    """Everything in the places that ``given`` names.

    Raises:
        UserError: a place that cannot be read.
    """
    output, uri = Path(given.get("output", "outputs")), given.get("uri", "")
    if not output.is_dir():
        if uri in ("", NO_STORE):
            raise UserError(f"There is no folder {output}, in which runs would be; name the folder of all outputs: output=….")
        return add_stored([], uri, "uri")
    found = entries(output.resolve())
    store, key = ("", "") if uri == NO_STORE else store_of(output, uri)
    return add_stored(found, store, key) if store else found


def plain(entry: Entry) -> dict[str, Any]:
    """An entry as JSON knows it."""
    tree = asdict(entry) | {"folder": None if entry.folder is None else str(entry.folder)}
    return {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in tree.items()}


def lines(kept: Sequence[Entry], now: float) -> list[str]:
    """A heading and a line an entry, in columns as wide as their contents: no name is cut, however narrow the terminal or the pipe."""
    here = f"{Path.cwd()}/"
    rows = [COLUMNS, *(_cells(entry, now, here) for entry in kept)]
    return aligned(rows, {COLUMNS.index(name) for name in RIGHT})


def aligned(rows: Sequence[Sequence[str]], right: Iterable[int] = ()) -> list[str]:
    """Rows as lines; the columns ``right`` are justified to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = ["rjust" if at in set(right) else "ljust" for at in range(len(widths))]
    return ["  ".join(getattr(cell, side)(width) for cell, side, width in zip(row, sides, widths, strict=True)).rstrip() for row in rows]


def _cells(entry: Entry, now: float, here: str) -> tuple[str, ...]:
    arms = ", ".join(entry.arms[:MOST_ARMS]) + (f", … {len(entry.arms)}" if len(entry.arms) > MOST_ARMS else "")
    if entry.kind == SWEEP:
        metric = f"{entry.metric}: {entry.verdict}" if entry.verdict else entry.metric or entry.verdict
        status = f"{entry.status} {entry.done}/{entry.jobs}" if entry.jobs else entry.status
    else:
        metric = f"{entry.metric} {short(entry.value)}" if math.isfinite(entry.value) else ""
        status = entry.status
    cost = f"{count(entry.macs)} MACs" if math.isfinite(entry.macs) else "–"
    cells = (entry.name, arms or "–", metric or "–", status, cost, duration(entry.seconds), ago(now - entry.changed), _place(entry, here))
    return tuple(cell if cell.isprintable() else ascii(cell)[1:-1] for cell in cells)


def ago(seconds: float) -> str:
    """``3 h``: the largest unit that fits."""
    for unit, size in reversed(UNITS.items()):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return "now"


def _place(entry: Entry, here: str) -> str:
    """The folder, from ``here`` where it is below that; the run in the store where there is none."""
    if entry.folder is None:
        return f"(gone; in the store {entry.store_id})"
    return str(entry.folder).removeprefix(here)
