"""From a table of runs to the arms, pairs and values that are judged: columns by their names, and rules for what is missing."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from esper.compare.results.mlflow_sweep import CURVES, MOST_CURVES
from esper.compare.results.runs import Run, Seed, in_order
from esper.compare.sources.filters import filtered, parse_filter
from esper.compare.sources.table import (
    METRIC,
    NAME,
    NAMED,
    PARAM,
    RUN,
    SECONDS,
    START,
    STATUS,
    SYNONYMS,
    TAG,
    RunsTable,
    canonical,
    with_name_parts,
)
from esper.config import listing
from esper.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

MISSING = ("leave", "lost", "refuse")
ARM, BLOCK, PAIR = "esper arm", "esper block", "esper pair"  # columns of the chosen rows
#: Words of a metric's name that say which way is better.
SMALLER = frozenset(
    ("loss", "error", "err", "mse", "mae", "rmse", "nll", "perplexity", "ppl", "fid", "wer", "cer", "regret", "latency", "seconds", "time")
)
LARGER = frozenset(
    (
        "acc",
        "accuracy",
        "auc",
        "auroc",
        "f1",
        "precision",
        "recall",
        "score",
        "reward",
        "return",
        "r2",
        "map",
        "iou",
        "bleu",
        "psnr",
        "dice",
    )
)


@dataclass(frozen=True)
class Selection:
    """Which columns of a table say what: the keys of ``esper compare runs``, and the arguments of :func:`esper.compare.judge`.

    ``take`` is ``last``, ``best`` or the number of a step; ``missing`` says what happens to an arm that lacks a run of a pair.
    """

    arm: tuple[str, ...]
    metric: str
    pair: str = ""
    block: tuple[str, ...] = ()
    take: str = "last"
    filter: str = ""
    missing: str = "leave"
    names: str = ""
    run: str = ""
    step: str = ""
    cost: tuple[str, ...] = ()
    curve: str = ""

    def __post_init__(self) -> None:
        if not self.arm or not self.metric:
            raise UserError("Say what makes the arms and what is judged, as in arm=params.lr metric=val_acc.")
        if self.take not in ("last", "best") and not re.fullmatch(r"\d+", self.take):
            raise UserError(f"take={self.take} is not accepted: it takes last, best or the number of a step, as in take=1000.")
        if self.missing not in MISSING:
            raise UserError(f"missing={self.missing} is not accepted: it takes {listing(MISSING)}.")

    @property
    def wanted(self) -> set[str]:
        """The names that may be metrics."""
        return {self.metric, self.curve, *self.arm, *self.block, *self.cost, *(one.column for one in parse_filter(self.filter))} - {""}


@dataclass(frozen=True)
class Gathered:
    """The runs that are judged, and what a reader should know about the choice.

    ``arms`` has the settings of every arm by its name, ``seeds`` what pairs the runs (their numbers where nothing does), ``started``
    when each run began, in seconds since 1970, as far as the source says. ``curves`` are the histories: columns arm, block, run,
    step and value.
    """

    runs: list[Run]
    arms: dict[str, dict[str, Any]]
    seeds: tuple[Seed, ...]
    blocks: tuple[str, ...]
    paired: bool
    started: dict[str, float]
    notes: list[str] = field(default_factory=list)
    curves: pd.DataFrame | None = None


def guessed_direction(metric: str) -> str:
    """``max`` or ``min`` where the metric's name says it; empty where it does not."""
    words = set(re.split(r"[^a-z0-9]+", metric.lower()))
    sides = [side for side, known in (("min", SMALLER), ("max", LARGER)) if words & known]
    return sides[0] if len(sides) == 1 else ""


def gather(table: RunsTable, chosen: Selection, direction: str, curves: bool = True) -> Gathered:
    """The runs of a table as the selection takes them.

    Args:
        direction: ``max`` or ``min``, by which the best of a run's values is taken.
        curves: whether the histories are read as well.

    Raises:
        UserError: columns that there are not, no run that is left, one run for two places, a pair that must not be missing.
    """
    table = with_name_parts(_by_run(table, chosen), chosen.names)
    metric = table.column(chosen.metric, "metric")
    placed, notes = _placed(table, chosen)
    values = _values(table, placed, metric, chosen, direction)
    runs = _runs(table, placed, values, chosen)
    if chosen.pair and chosen.missing != "leave":
        runs += _absent(runs, chosen.missing)
    starts = zip(placed[RUN], placed[START], strict=True) if START in placed.columns else ()
    return Gathered(
        runs=runs,
        arms=_arms(table, placed, chosen),
        seeds=tuple(in_order({run.seed for run in runs})),
        blocks=tuple(map(str, in_order({run.block for run in runs}))),
        paired=bool(chosen.pair),
        started={str(run): float(start) for run, start in starts if not math.isnan(float(start))},
        notes=notes,
        curves=_curves(table, placed, chosen, metric) if curves else None,
    )


def _by_run(table: RunsTable, chosen: Selection) -> RunsTable:
    """A table of steps as one of runs, where a column tells the steps."""
    if table.once or not (chosen.step or chosen.run):
        return table
    frame = table.frame
    if chosen.run:
        frame = frame.assign(**{RUN: frame[table.column(chosen.run, "run")].astype(str)})
    if not chosen.step:
        return dataclasses.replace(table, frame=frame.assign(**{NAME: frame[RUN]}))
    step = table.column(chosen.step, "step")
    if not chosen.run:
        if not chosen.pair:
            raise UserError(f"step={chosen.step} makes a row a step, and nothing says which rows are one run; name its column: run=….")
        keys = [table.column(name, "arm") for name in (*chosen.arm, *chosen.block, chosen.pair)]
        frame = frame.assign(**{RUN: [" ".join(f"{canonical(value)}" for value in row) for row in frame[keys].itertuples(index=False)]})
    frame = frame.sort_values(step, kind="stable")
    steps = frame[[RUN, step]].set_axis(["run", "step"], axis=1)

    def history(column: str) -> pd.DataFrame:
        return steps.assign(value=_numbers(frame[column])).dropna()

    last = frame.groupby(RUN, sort=False, as_index=False).last()
    return RunsTable(last.assign(**{NAME: last[RUN]}), table.place, history, table.metrics)


def _numbers(column: pd.Series) -> pd.Series:
    import pandas as pd

    return pd.to_numeric(column, errors="coerce").astype(float)


def _placed(table: RunsTable, chosen: Selection) -> tuple[pd.DataFrame, list[str]]:
    """The rows that belong to an arm, with their arm, block and pair; and notes on those that are left out."""
    import pandas as pd

    arms, blocks = ([table.column(name, key) for name in names] for names, key in ((chosen.arm, "arm"), (chosen.block, "block")))
    pair = table.column(chosen.pair, "pair") if chosen.pair else ""
    frame = filtered(table, parse_filter(chosen.filter))
    if START in frame.columns:
        frame = frame.sort_values(START, kind="stable")  # runs without a pair are numbered as they began
    if frame.empty:
        raise UserError(f"No run of {table.place} passes filter={chosen.filter}; loosen it.")
    notes = []
    if STATUS in frame.columns:
        under_way = frame[STATUS].isin(["RUNNING", "KILLED"])
        if under_way.any():
            notes.append(f"Runs that are under way or were stopped are left out: {int(under_way.sum())}.")
        frame = frame[~under_way]
    pairs = [canonical(one) for one in frame[pair]] if pair else [0] * len(frame)
    for column, found in ((ARM, _named(frame, arms)), (BLOCK, _named(frame, blocks)), (PAIR, pairs)):
        frame = frame.assign(**{column: pd.Series(found, index=frame.index, dtype=object)})  # or pandas makes 3.0 of the seed 3
    for column, names, key in ((ARM, arms, "arm"), (BLOCK, blocks, "block"), (PAIR, [pair], "pair")):
        lacking = frame[column].isna()
        if lacking.any():
            notes.append(f"Runs without {listing(names)} ({key}) are left out: {int(lacking.sum())}.")
        frame = frame[~lacking]
    if frame.empty:
        raise UserError(f"No run of {table.place} is left to judge: {' '.join(notes) or 'none finished.'}")
    return frame, notes


def _named(frame: pd.DataFrame, columns: Sequence[str]) -> list[str | None]:
    """A readable name for every row: the value alone where it is a word, ``lr=0.1`` where it is a number, all where there are several."""
    if not columns:
        return [""] * len(frame)
    cells = [[canonical(value) for value in frame[column]] for column in columns]
    words = len(columns) == 1 and any(isinstance(value, str) and not _is_number(value) for value in cells[0])
    shorts = [_short(column) for column in columns]
    if words:
        return [None if value is None else str(value) for value in cells[0]]
    rows = zip(*cells, strict=True)
    return [None if None in row else " ".join(f"{name}={value}" for name, value in zip(shorts, row, strict=True)) for row in rows]


def arms_of_values(values: Sequence[str], columns: Sequence[str], key: str) -> dict[str, dict[str, Any]]:
    """The settings of arms (or blocks) by the names that their runs will get, from values of one column or from ``a=1 b=2`` of several.

    Raises:
        UserError: a value that does not name these columns, or one given twice.
    """
    import pandas as pd

    shorts = [_short(column) for column in columns]
    rows: list[dict[str, Any]] = []
    for value in values:
        alone = {shorts[0]: value.removeprefix(f"{shorts[0]}=")}
        parts = alone if len(columns) == 1 else dict(word.partition("=")[::2] for word in value.split())
        if set(parts) != set(shorts):
            form = " ".join(f"{name}=…" for name in shorts)
            raise UserError(f"{key}={value} is not accepted: {','.join(columns)} make it, so write each as '{form}'.")
        rows.append({name: canonical(parts[name]) for name in shorts})
    named = _named(pd.DataFrame(rows, dtype=object), shorts)
    if len(set(named)) < len(named):
        raise UserError(f"{key}={','.join(values)} names one twice; give each once.")
    return {str(name): row for name, row in zip(named, rows, strict=True)}


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _short(column: str) -> str:
    """A column's name without the words that every parameter, metric or tag begins with."""
    for prefix in (PARAM, METRIC, TAG, NAMED, *SYNONYMS):
        column = column.removeprefix(prefix)
    return column


def _arms(table: RunsTable, placed: pd.DataFrame, chosen: Selection) -> dict[str, dict[str, Any]]:
    """Settings by arm, numbers by size and words by letters."""
    columns = [table.column(name, "arm") for name in chosen.arm]
    rows = {str(row[-1]): [canonical(value) for value in row[:-1]] for row in placed[[*columns, ARM]].itertuples(index=False)}
    order = sorted(rows, key=lambda arm: [_by_size(value) for value in rows[arm]])
    return {arm: {_short(column): value for column, value in zip(columns, rows[arm], strict=True)} for arm in order}


def _by_size(value: Any) -> tuple[bool, float, str]:
    text = str(value)
    number = _is_number(text)
    return not number, float(text) if number else 0.0, text


def _values(table: RunsTable, placed: pd.DataFrame, metric: str, chosen: Selection, direction: str) -> dict[str, float]:
    """The metric of every run: its last value, its best one, or the last at or before a step."""
    last = _numbers(placed[metric])
    if chosen.take == "last":
        return dict(zip(placed[RUN].astype(str), last, strict=True))
    if table.history is None:
        raise UserError(f"take={chosen.take} needs every value of {chosen.metric}, and {table.place} has the last alone; leave take out.")
    history = table.history(metric)
    history = history[history["run"].astype(str).isin(set(placed[RUN].astype(str)))].dropna(subset=["step"])
    if chosen.take == "best":
        grouped = history.dropna(subset=["value"]).groupby("run")["value"]
        best = grouped.max() if direction == "max" else grouped.min()
    else:
        reached = history[history["step"] <= int(chosen.take)].sort_values("step", kind="stable")
        best = reached.groupby("run")["value"].apply(lambda values: values.iloc[-1])  # not last(), which passes over NaN
    return {str(run): float(value) for run, value in zip(best.index, best, strict=True)}


def _runs(table: RunsTable, placed: pd.DataFrame, values: dict[str, float], chosen: Selection) -> list[Run]:
    costs = {_short(column): _numbers(placed[column]).to_list() for column in (table.column(name, "cost") for name in chosen.cost)}
    if SECONDS in placed.columns and "seconds" not in costs:
        costs["seconds"] = _numbers(placed[SECONDS]).to_list()
    status = placed[STATUS].to_list() if STATUS in placed.columns else ["FINISHED"] * len(placed)
    number: dict[tuple[str, str], int] = {}
    found: list[Run] = []
    for at, (arm, block, pair, run) in enumerate(zip(placed[ARM], placed[BLOCK], placed[PAIR], placed[RUN].astype(str), strict=True)):
        place = number[arm, block] = number.get((arm, block), -1) + 1
        known = {name: column[at] for name, column in costs.items() if math.isfinite(column[at])}
        seed: Seed = pair if chosen.pair else place
        found.append(Run(str(arm), seed, values.get(run, math.nan), str(block), str(status[at]), costs=known, id=run))
    return _alike(found)


def _alike(runs: list[Run]) -> list[Run]:
    """The runs with pairs of one kind: all of them text where some are no numbers."""
    if all(isinstance(run.seed, int) for run in runs):
        return runs
    return [dataclasses.replace(run, seed=str(run.seed)) for run in runs]


def _absent(runs: list[Run], rule: str) -> list[Run]:
    """A lost run for every pair that an arm lacks in a block in which another arm has it.

    Raises:
        UserError: where the rule is to refuse, naming the first that are missing.
    """
    there = {(run.arm, run.block, run.seed) for run in runs}
    arms = list(dict.fromkeys(run.arm for run in runs))
    absent = [
        (arm, block, seed)
        for block, seed in dict.fromkeys((run.block, run.seed) for run in runs)
        for arm in arms
        if (arm, block, seed) not in there
    ]
    if absent and rule == "refuse":
        told = ", ".join(" ".join(filter(None, (arm, block, f"pair {seed}"))) for arm, block, seed in absent[:5])
        more = ", …" if len(absent) > 5 else ""
        raise UserError(f"Runs are missing: {told}{more} ({len(absent)} in all); run them, or set missing=leave or missing=lost.")
    return [Run(arm, seed, math.nan, block, "MISSING", id="none") for arm, block, seed in absent]


def _curves(table: RunsTable, placed: pd.DataFrame, chosen: Selection, metric: str) -> pd.DataFrame | None:
    """The history of the curve's metric, with the place of every run; None where the source has none, or more than a page can show."""
    if table.history is None or len(placed) > (MOST_CURVES if chosen.curve else table.curves):
        return None
    history = table.history(table.column(chosen.curve, "curve") if chosen.curve else metric)
    places = placed[[RUN, ARM, BLOCK]].set_axis(["run", "arm", "block"], axis=1)
    found = history.assign(run=history["run"].astype(str)).merge(places.assign(run=places["run"].astype(str)), on="run")
    found = found.dropna(subset=["value"])
    return found[CURVES] if found["run"].duplicated().any() else None  # single values make no line
