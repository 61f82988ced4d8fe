"""Runs as a table, whatever program made them: a row a run, and the names by which a person may ask for a column."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from esper.compare.results.mlflow_sweep import MOST_CURVES
from esper.config import did_you_mean, listing, nearest
from esper.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

PARAM, METRIC, TAG, NAMED = "params.", "metrics.", "tags.", "name."
#: What W&B and trackio call a parameter and a last value.
SYNONYMS = {"config.": PARAM, "summary.": METRIC}
#: Columns that describe a run: its id, name and status, when it began (seconds since 1970) and how many seconds it took.
RUN, NAME, STATUS, START, SECONDS = "run_id", "run_name", "status", "start_time", "seconds"
#: Statuses of other programs, in MLflow's words. A run that somebody stopped is neither finished nor failed.
STATUSES = {
    "finished": "FINISHED",
    "failed": "FAILED",
    "crashed": "FAILED",
    "running": "RUNNING",
    "scheduled": "RUNNING",
    "pending": "RUNNING",
    "preempting": "RUNNING",
    "preempted": "KILLED",
    "killed": "KILLED",
}

History = Callable[[str], "pd.DataFrame"]


@dataclass(frozen=True)
class RunsTable:
    """A row a run, with parameters, tags and last values as columns.

    ``history`` gives all values of a metric by its column's name, as columns ``run``, ``step`` and ``value``; None where the source
    keeps last values alone. ``place`` names the source in messages, ``metrics`` the metrics that may be asked for, where not all are
    columns yet. ``once`` says that a row is a whole run, and not one of its steps. ``curves`` is the number of runs up to which the
    histories are worth reading for a page that nobody asked to draw them: a server is asked run by run.
    """

    frame: pd.DataFrame
    place: str
    history: History | None = None
    metrics: Callable[[], list[str]] = field(default=lambda: [])
    once: bool = True
    curves: int = MOST_CURVES

    def column(self, name: str, key: str) -> str:
        """The column that ``name`` means: itself, or the one parameter, metric or tag of that name.

        Args:
            key: the setting by which it was asked for, for the message.

        Raises:
            UserError: there is none, or more than one.
        """
        columns = [str(column) for column in self.frame.columns]
        if name in columns:
            return name
        for short, long in SYNONYMS.items():
            if name.startswith(short) and long + name.removeprefix(short) in columns:
                return long + name.removeprefix(short)
        found = [prefix + name for prefix in (PARAM, METRIC, TAG, NAMED) if prefix + name in columns]
        if len(found) == 1:
            return found[0]
        if found:
            raise UserError(f"{key}={name} may be {listing(found)} of {self.place}; write one of these out.")
        known = [column for column in columns if column not in (RUN, NAME, STATUS, START, SECONDS)] or columns
        more = [METRIC + one for one in self.metrics()] if key in ("metric", "cost") else []
        names = list(dict.fromkeys([*known, *more]))
        shown = names if len(names) <= 12 else [*names[:12], f"{len(names) - 12} more"]
        bare = {one.split(".", 1)[-1]: one for one in names}
        near = did_you_mean(name, names, otherwise="") or (f"; did you mean {bare[close]}?" if (close := nearest(name, bare)) else ".")
        raise UserError(f"{key}={name} is nothing that the runs of {self.place} have; they have {listing(shown)}{near}")


def canonical(value: Any) -> int | str | None:
    """A value that tells runs apart: whole numbers as such, other numbers and words as text; None where there is none.

    0.10 and 0.1 are the same, and so are the seeds 3, 3.0 and "3".
    """
    if value is None or value != value:
        return None
    text = str(value).strip()
    if not text or text.lower() in ("nan", "none", "<na>"):
        return None
    if isinstance(value, bool) or text in ("True", "False"):
        return text.lower()
    try:
        number = float(text)
    except ValueError:
        return text
    if number != number or abs(number) == float("inf"):
        return None
    return int(number) if number.is_integer() and abs(number) < 1e15 else f"{number:.12g}"


def epoch_seconds(times: pd.Series) -> pd.Series:
    """Times as seconds since 1970, from numbers of seconds or from dates; NaN where there is none."""
    import pandas as pd

    numbers = pd.to_numeric(times, errors="coerce")
    if numbers.notna().any():
        return numbers.astype(float)
    dates = pd.to_datetime(times, utc=True, errors="coerce", format="ISO8601")
    return (dates - pd.Timestamp(0, tz="UTC")).dt.total_seconds()


def name_parts(names: Iterable[str], pattern: str) -> list[dict[str, str]]:
    """The parts of every name that ``pattern`` names, as ``{arm}-seed{seed}`` does; none for a name of another form.

    Raises:
        UserError: a pattern without parts, or with one that is named twice.
    """
    pieces = re.split(r"\{(\w+)\}", pattern)
    parts = pieces[1::2]
    if not parts or len(set(parts)) < len(parts):
        raise UserError(
            f"names={pattern} is not accepted: give the form of the runs' names, each part once, as in names='{{arm}}-seed{{seed}}'."
        )
    form = "".join(f"(?P<{piece}>[^/]+?)" if i % 2 else re.escape(piece) for i, piece in enumerate(pieces))
    found = re.compile(form)
    return [match.groupdict() if (match := found.fullmatch(name)) else {} for name in names]


def with_name_parts(table: RunsTable, pattern: str) -> RunsTable:
    """The table with a column ``name.<part>`` for every part of the runs' names; unchanged for no pattern."""
    if not pattern:
        return table
    import dataclasses

    import pandas as pd

    if NAME not in table.frame.columns:
        raise UserError(f"names={pattern} takes the names of runs apart, and those of {table.place} have none; name columns instead.")
    parts = pd.DataFrame(name_parts(map(str, table.frame[NAME]), pattern), index=table.frame.index)
    if parts.empty or not len(parts.columns):
        example = next(iter(table.frame[NAME]), "none")
        raise UserError(f"names={pattern} fits none of the names of the runs of {table.place}, of which one is {example!r}.")
    return dataclasses.replace(table, frame=pd.concat([table.frame, parts.add_prefix(NAMED)], axis=1))
