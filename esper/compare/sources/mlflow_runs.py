"""The runs of any MLflow store as a table: chosen experiments, parameters, tags, and the metrics that are asked for."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

from esper.compare.results.mlflow_sweep import KIND
from esper.compare.sources.mlflow_reader import MlflowReader
from esper.compare.sources.table import METRIC, NAME, PARAM, RUN, SECONDS, START, STATUS, TAG, RunsTable
from esper.config import did_you_mean, listing
from esper.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

WHOLE = ("sweep", "plan", "verdict")  # kinds of runs that stand for many and were not trained themselves
UNDERSTOOD = {"SCHEDULED": "RUNNING"}


def mlflow_runs(reader: MlflowReader, place: str, experiments: Sequence[str], metrics: Collection[str]) -> RunsTable:
    """The runs of these experiments, by name or id; of all where none is named.

    Args:
        metrics: those to read, under any of the names by which they may be asked for.

    Raises:
        UserError: an experiment that there is not, or no runs.
    """
    import pandas as pd

    ids = _experiment_ids(reader, place, experiments)
    names = {name.removeprefix(METRIC).removeprefix("summary.") for name in metrics}
    rows: list[dict[str, Any]] = []
    for run in reader.runs(ids, metrics=names):
        if run.tags.get(KIND) in WHOLE:
            continue
        row: dict[str, Any] = {RUN: run.id, NAME: run.name, STATUS: UNDERSTOOD.get(run.status, run.status)}
        row |= {PARAM + key: value for key, value in run.params.items()}
        row |= {TAG + key: value for key, value in run.tags.items()}
        row |= {METRIC + key: value for key, value in run.metrics.items()}
        row |= {START: run.start / 1000} if run.start is not None else {}
        row |= {SECONDS: (run.end - run.start) / 1000} if run.start is not None and run.end is not None else {}
        rows.append(row)
    if not rows:
        where = f" in {listing(experiments)}" if experiments else ""
        raise UserError(f"The store at {place} has no runs{where}; name another experiment: experiment=….")
    frame = pd.DataFrame(rows)

    def history(column: str) -> pd.DataFrame:
        points = reader.history(column.removeprefix(METRIC), list(frame[RUN]))
        return pd.DataFrame(points, columns=["run", "step", "value"])

    return RunsTable(frame, place, history, lambda: reader.metric_names(ids), curves=reader.curves)


def _experiment_ids(reader: MlflowReader, place: str, asked: Sequence[str]) -> list[str]:
    known = reader.experiments()
    if not asked:
        return list(known)
    by_name = {name: number for number, name in known.items()}
    found = [by_name.get(one, one) for one in asked]
    for one, number in zip(asked, found, strict=True):
        if number not in known:
            near = did_you_mean(one, by_name)
            raise UserError(f"The store at {place} has no experiment {one!r}; it has {listing(list(by_name)[:12])}{near}")
    return found
