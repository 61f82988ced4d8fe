"""Projects of trackio: its database ``<project>.db``, or the Parquet files ``<project>.parquet`` and ``<project>_configs.parquet``."""

from __future__ import annotations

import contextlib
import json
import sqlite3
from pathlib import Path
from typing import TYPE_CHECKING, Any

from esper.compare.sources.table import METRIC, NAME, PARAM, RUN, SECONDS, START, RunsTable
from esper.errors import UserError
from esper.tracking.run_info import flatten

if TYPE_CHECKING:
    import pandas as pd

OWN = {"id", "run_id", "timestamp", "run_name", "step", "log_id", "space_id", "created_at"}


def is_trackio_database(path: Path) -> bool:
    """Whether this SQLite file is a project of trackio."""
    with contextlib.closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as opened:
        names = {row[0] for row in opened.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    return {"metrics", "configs"} <= names and "latest_metrics" not in names


def trackio_database(path: Path) -> RunsTable:
    """The runs of a project in its database; early versions tell runs apart by name alone."""
    with contextlib.closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as opened:
        opened.row_factory = sqlite3.Row
        try:
            metrics = [dict(row) for row in opened.execute("SELECT * FROM metrics ORDER BY step, id")]
            configs = [dict(row) for row in opened.execute("SELECT * FROM configs")]
        except sqlite3.DatabaseError as error:
            raise UserError(f"The trackio project {path} cannot be read ({error}); bring back a copy of it.") from error
    for rows, column in ((metrics, "metrics"), (configs, "config")):
        for row in rows:
            row["values"] = json.loads(row[column] or "{}")
    return _runs(metrics, configs, str(path))


def is_trackio_export(frame: pd.DataFrame) -> bool:
    """Whether it is the Parquet file that trackio writes of a project's metrics."""
    return {"run_name", "step", "timestamp", "space_id"} <= set(frame.columns)


def trackio_export(frame: pd.DataFrame, path: Path) -> RunsTable:
    """The runs of a project in its Parquet files.

    Raises:
        UserError: the file with the runs' configurations is not beside it.
    """
    import pandas as pd

    beside = path.with_name(f"{path.stem}_configs.parquet")
    if not beside.exists():
        raise UserError(f"{beside} is missing, in which trackio keeps the configurations of the runs of {path.name}; copy it as well.")
    sides = []
    for side in (frame.sort_values(["step", "id"]), pd.read_parquet(beside)):
        rows: list[dict[str, Any]] = [{str(key): value for key, value in row.items()} for row in side.to_dict("records")]
        for row in rows:
            row["values"] = {key: value for key, value in row.items() if key not in OWN and value is not None and value == value}
        sides.append(rows)
    return _runs(sides[0], sides[1], str(path))


def _runs(metrics: list[dict[str, Any]], configs: list[dict[str, Any]], place: str) -> RunsTable:
    import pandas as pd

    def key(row: dict[str, Any]) -> str:
        return str(row.get("run_id") or row["run_name"])

    rows: dict[str, dict[str, Any]] = {}
    values: list[tuple[str, str, int, float]] = []
    times: dict[str, list[str]] = {}
    for row in configs:
        kept = {name: value for name, value in flatten(row["values"]).items() if not name.startswith("_")}
        rows[key(row)] = {RUN: key(row), NAME: row["run_name"]} | {PARAM + name: value for name, value in kept.items()}
    for row in metrics:
        run = rows.setdefault(key(row), {RUN: key(row), NAME: row["run_name"]})
        times.setdefault(key(row), []).append(str(row["timestamp"]))
        for name, value in row["values"].items():
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                run[METRIC + name] = float(value)
                values.append((key(row), METRIC + name, int(row["step"]), float(value)))
    for run_id, stamps in times.items():
        begun, ended = (pd.Timestamp(at(stamps)).timestamp() for at in (min, max))
        rows[run_id] |= {START: begun, SECONDS: ended - begun}
    whole = pd.DataFrame(values, columns=["run", "metric", "step", "value"])
    return RunsTable(pd.DataFrame(list(rows.values())), place, lambda name: whole.loc[whole["metric"] == name, ["run", "step", "value"]])
