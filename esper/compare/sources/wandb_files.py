"""Exports of Weights & Biases: the runs table and a chart as CSV, and the CSV of the public API's documented recipe.

- Runs table: ``"Name","State","Notes","User","Tags","Created","Runtime","Sweep"``, then configuration and summary by their names.
- Chart: ``"Step"``, and for every run ``"<run> - <metric>"``, ``"<run> - <metric>__MIN"``, ``"<run> - <metric>__MAX"``.
- API: ``summary``, ``config`` and ``name``, the first two as dictionaries.
"""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING, Any

from esper.compare.sources.table import METRIC, NAME, PARAM, RUN, SECONDS, START, STATUS, STATUSES, RunsTable, epoch_seconds
from esper.errors import UserError
from esper.tracking.run_info import flatten

if TYPE_CHECKING:
    import pandas as pd

RUNS = {"Name", "State", "Created", "Runtime"}
API = {"summary", "config", "name"}


def is_runs_export(frame: pd.DataFrame) -> bool:
    """Whether it is the runs table of a project."""
    return set(frame.columns) >= RUNS


def runs_export(frame: pd.DataFrame, place: str) -> RunsTable:
    """The runs table: configuration and last values keep their names, which W&B does not tell apart."""
    states = frame["State"].astype(str).str.lower().map(STATUSES).fillna("FINISHED")
    ids = frame["ID"] if "ID" in frame.columns else frame["Name"]
    added = {RUN: ids.astype(str), NAME: frame["Name"].astype(str), STATUS: states}
    added |= {START: epoch_seconds(frame["Created"]), SECONDS: _numbers(frame["Runtime"])}
    return RunsTable(frame.assign(**added), place)


def _numbers(column: pd.Series) -> pd.Series:
    import pandas as pd

    return pd.to_numeric(column, errors="coerce")


def is_chart_export(frame: pd.DataFrame) -> bool:
    """Whether it is the CSV of a line chart."""
    names = list(map(str, frame.columns))
    return any(f"{name}__MIN" in names and " - " in name for name in names)


def chart_export(frame: pd.DataFrame, place: str) -> RunsTable:
    """A line chart: the history of one metric in several runs, which have no more than their names."""
    import pandas as pd

    axis, names = str(frame.columns[0]), set(map(str, frame.columns))
    lines = [name for name in map(str, frame.columns) if f"{name}__MIN" in names]
    rows, pieces = [], []
    for line in lines:
        run, _, metric = line.rpartition(" - ")
        kept = frame[[axis, line]].dropna()
        pieces.append(pd.DataFrame({"run": run, "metric": METRIC + metric, "step": kept[axis], "value": _numbers(kept[line])}))
        last = float(pieces[-1]["value"].iloc[-1]) if len(kept) else float("nan")
        rows.append({RUN: run, NAME: run, METRIC + metric: last})
    whole = pd.concat(pieces, ignore_index=True)
    table = pd.DataFrame(rows).groupby(RUN, sort=False, as_index=False).first()
    return RunsTable(table, place, lambda name: whole.loc[whole["metric"] == name, ["run", "step", "value"]])


def is_api_export(frame: pd.DataFrame) -> bool:
    """Whether it is the table that W&B's documentation makes with its public API."""
    return set(frame.columns) >= API


def api_export(frame: pd.DataFrame, place: str) -> RunsTable:
    """Configuration and summary of every run as W&B's API gives them.

    Raises:
        UserError: a cell that holds no dictionary.
    """
    import pandas as pd

    rows = []
    for number, row in enumerate(frame.to_dict("records"), 1):
        config, summary = (_dictionary(row[name], name, number, place) for name in ("config", "summary"))
        made: dict[str, Any] = {RUN: str(row.get("id", row["name"])), NAME: str(row["name"])}
        made |= {PARAM + key: value for key, value in flatten(config).items()}
        made |= {METRIC + key: value for key, value in flatten(summary).items() if not key.startswith("_")}
        made |= {START: summary["_timestamp"] - summary["_runtime"]} if {"_timestamp", "_runtime"} <= summary.keys() else {}
        made |= {SECONDS: summary["_runtime"]} if "_runtime" in summary else {}
        made |= {STATUS: STATUSES.get(str(row["state"]).lower(), "FINISHED")} if "state" in row else {}
        rows.append(made)
    return RunsTable(pd.DataFrame(rows), place)


def _dictionary(cell: Any, name: str, number: int, place: str) -> dict[str, Any]:
    try:
        found = ast.literal_eval(cell) if isinstance(cell, str) else cell
    except (ValueError, SyntaxError):
        found = None
    if not isinstance(found, dict):
        raise UserError(f"Row {number} of {place} has no dictionary in {name}; export it as W&B's API gives it, or as columns.")
    return found
