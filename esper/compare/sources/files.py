"""Runs in a table file: CSV, TSV or Parquet, a row a run, or a row a step of a run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from esper.compare.sources.table import NAME, RUN, START, STATUS, STATUSES, RunsTable, epoch_seconds
from esper.compare.sources.trackio_files import is_trackio_export, trackio_export
from esper.compare.sources.wandb_files import api_export, chart_export, is_api_export, is_chart_export, is_runs_export, runs_export
from esper.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

ENDINGS = (".csv", ".tsv", ".parquet")


def read_file(path: Path) -> RunsTable:
    """The runs in a file, by its form: an export of W&B or trackio, or a table of the user's own.

    Raises:
        UserError: the file cannot be read as a table.
    """
    frame = read_frame(path)
    if is_runs_export(frame):
        return runs_export(frame, str(path))
    if is_chart_export(frame):
        return chart_export(frame, str(path))
    if is_api_export(frame):
        return api_export(frame, str(path))
    if is_trackio_export(frame):
        return trackio_export(frame, path)
    return own_table(frame, str(path))


def read_frame(path: Path) -> pd.DataFrame:
    """The table in this file.

    Raises:
        UserError: it cannot be read as one.
    """
    import pandas as pd

    try:
        if path.suffix == ".parquet":
            frame = pd.read_parquet(path)
        else:
            frame = pd.read_csv(path, sep="\t" if path.suffix == ".tsv" else ",", keep_default_na=True)
    except FileNotFoundError:
        raise UserError(f"There is no file {path}; give the path of a table: store=<file>.csv or .parquet.") from None
    except Exception as error:  # the readers' own errors have no common kind
        reason = " ".join(str(error).split())[:200].rstrip(".")
        raise UserError(f"The table {path} cannot be read ({reason}); give a CSV file with a header, or a Parquet file.") from error
    if frame.empty:
        raise UserError(f"The table {path} has no rows; give one with a row a run.")
    return frame


def own_table(frame: pd.DataFrame, place: str) -> RunsTable:
    """A table of the user's own; a column ``status``, ``run_id`` or ``start_time`` means what it does elsewhere."""
    frame = frame.rename(columns=str)
    if STATUS in frame.columns:
        words = frame[STATUS].astype(str).str.lower()
        frame = frame.assign(**{STATUS: words.map(STATUSES).fillna("FINISHED")})
    if START in frame.columns:
        frame = frame.assign(**{START: epoch_seconds(frame[START])})
    if RUN not in frame.columns:
        frame = frame.assign(**{RUN: frame[NAME] if NAME in frame.columns else [f"row {i + 1}" for i in range(len(frame))]})
    return RunsTable(frame, place, once=False)
