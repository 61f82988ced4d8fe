"""What turns the rows of a table into numbers: fitted on the training rows alone, kept as JSON, applied to any rows with these columns."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from esper.config import listing, structure
from esper.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

FILE = "preprocessing.json"
NUMBER, CATEGORY, TIME = "number", "category", "time"
CLASSIFICATION, REGRESSION = "classification", "regression"
ID_LIKE = 0.9  # a text column with more distinct values than this share of its rows tells nothing of other rows
DAY = 86_400 * 10**9  # nanoseconds


@dataclass
class Column:
    """One column of the table, as the training rows have it.

    A number becomes (x − mean)/deviation, with the median where it is missing, and a flag where any was missing in training. A time
    becomes days, day of the year and weekday, each such a number. A category becomes one feature for each of ``categories``, one for all
    others where there were others, and one for missing where any was missing.
    """

    name: str
    kind: str
    means: list[float] = field(default_factory=list)
    deviations: list[float] = field(default_factory=list)
    medians: list[float] = field(default_factory=list)
    categories: list[str] = field(default_factory=list)
    other: bool = False
    missing: bool = False

    @property
    def features(self) -> int:
        """How many inputs of the model it makes."""
        return (len(self.categories) + self.other if self.kind == CATEGORY else len(self.means)) + self.missing

    def inputs(self, values: pd.Series) -> np.ndarray[Any, np.dtype[np.float32]]:
        """The features of these values, ``[rows, features]``."""
        gone = values.isna().to_numpy()
        made = np.zeros((len(values), self.features), dtype=np.float32)
        if self.kind == CATEGORY:
            known = {text: at for at, text in enumerate(self.categories)}
            places = values.map(text_of).map(known).fillna(-1).to_numpy().astype(int)
            rows = np.arange(len(values))
            fits = (places >= 0) & ~gone
            made[rows[fits], places[fits]] = 1.0
            if self.other:
                made[~fits & ~gone, len(self.categories)] = 1.0
        else:
            numbers = _numbers(values, self.kind)
            filled = np.where(np.isnan(numbers), self.medians, numbers)
            made[:, : len(self.means)] = (filled - self.means) / self.deviations
        if self.missing:
            made[gone, -1] = 1.0
        return made


@dataclass
class Target:
    """The column to predict: the ``classes`` of a classification, or mean and deviation of a regression's training rows."""

    name: str
    kind: str
    classes: list[str] = field(default_factory=list)
    mean: float = 0.0
    deviation: float = 1.0

    def tensor(self, values: pd.Series) -> Tensor:
        """Class numbers (int64), or standardised values (float32); ``[rows]``."""
        if self.kind == CLASSIFICATION:
            known = {text: at for at, text in enumerate(self.classes)}
            return torch.tensor([known[text_of(value)] for value in values], dtype=torch.int64)
        numbers = values.to_numpy(dtype=np.float64)
        return torch.from_numpy(((numbers - self.mean) / self.deviation).astype(np.float32))


@dataclass
class Preprocessing:
    """All that a model of a table needs to know of it besides its weights."""

    columns: list[Column]
    target: Target

    @property
    def features(self) -> int:
        """Inputs of the model."""
        return sum(one.features for one in self.columns)

    def inputs(self, frame: pd.DataFrame) -> Tensor:
        """The model's inputs, ``[rows, features]`` float32, of rows that have these columns, in any order.

        Raises:
            UserError: a column that is not there, or that holds something else than in training.
        """
        if absent := [one.name for one in self.columns if one.name not in frame]:
            raise UserError(f"The table has no column {listing(absent)}, which the model was trained with.")
        parts = [one.inputs(_typed(frame[one.name], one)) for one in self.columns]
        return torch.from_numpy(np.concatenate(parts, axis=1))

    def predictions(self, output: Tensor) -> pd.Series:
        """What the model's ``output`` says: a class for each row, or a value in the target's own unit."""
        import pandas as pd

        if self.target.kind == CLASSIFICATION:
            return pd.Series([self.target.classes[at] for at in output.argmax(1).tolist()], name=self.target.name)
        values = output.detach().double().reshape(-1).numpy() * self.target.deviation + self.target.mean
        return pd.Series(values, name=self.target.name)

    def plain(self) -> dict[str, Any]:
        """As JSON knows it."""
        return asdict(self)


def read_preprocessing(path: str | Path) -> Preprocessing:
    """The preprocessing that a run of ``task=table`` left: its folder, or the file.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    place = Path(path) / FILE if Path(path).is_dir() else Path(path)
    try:
        tree = json.loads(place.read_text(encoding="utf-8"))
        columns = [structure(Column, one, "columns") for one in tree["columns"]]
        return Preprocessing(columns, structure(Target, tree["target"], "target"))
    except FileNotFoundError:
        raise UserError(f"{place} does not exist; the runs of task=table write it, into their folder and beside their model.") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{place} cannot be read ({error}); export the run again, or restore the file.") from error


def write_preprocessing(preprocessing: Mapping[str, Any] | None, folder: Path) -> None:
    """Write ``preprocessing.json`` of a task that has one."""
    if preprocessing is not None:
        partial = folder / f".{FILE}"
        partial.write_text(json.dumps(preprocessing, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
        partial.replace(folder / FILE)


def fit(train: pd.DataFrame, target: Target, categories: Sequence[str], most: int) -> tuple[Preprocessing, dict[str, str]]:
    """The preprocessing of the training rows, and the columns that are left out with the reason.

    Args:
        train: the training rows, the target among them.
        categories: columns whose numbers are names.
        most: categories a column may have; the rarest are taken together.
    """
    found, left = [], {}
    for name in train.columns:
        if name == target.name:
            continue
        column, why = _fitted(train[name], name in categories, most)
        if column is None:
            left[str(name)] = why
        else:
            found.append(column)
    return Preprocessing(found, target), left


def _fitted(values: pd.Series, named: bool, most: int) -> tuple[Column | None, str]:
    name, present = str(values.name), values.dropna()
    if present.nunique() < 2 and not (len(present) and values.isna().any()):
        return None, "the same in every training row" if len(present) else "empty"
    missing = bool(values.isna().any())
    kind = CATEGORY if named else kind_of(values)
    if kind == CATEGORY:
        counts = present.map(text_of).value_counts()
        if not named and len(counts) > max(most, ID_LIKE * len(present)):
            return None, "a different text in nearly every row"
        order = sorted(counts.index, key=lambda text: (-int(counts[text]), text))
        rare = len(order) > most
        return Column(name, CATEGORY, categories=order[:most], other=rare, missing=missing), ""
    numbers = _numbers(values, kind)
    medians = np.nanmedian(numbers, axis=0)
    filled = np.where(np.isnan(numbers), medians, numbers)
    deviations = filled.std(axis=0)
    spread = np.where(deviations > 0, deviations, 1.0)
    return Column(name, kind, filled.mean(axis=0).tolist(), spread.tolist(), medians.tolist(), missing=missing), ""


def kind_of(values: pd.Series) -> str:
    """What a column holds: numbers (and truth values), times, or categories. A text column of ISO dates is one of times."""
    import pandas as pd
    from pandas.api import types

    if types.is_bool_dtype(values) or types.is_numeric_dtype(values):
        return NUMBER
    if types.is_datetime64_any_dtype(values):
        return TIME
    present = values.dropna()
    if len(present) and all(isinstance(one, bool) for one in present):
        return NUMBER
    texts = present.map(text_of)
    dates = len(texts) > 0 and bool(texts.str.fullmatch(r"\d{4}-\d{2}-\d{2}([T ].*)?").all())
    return TIME if dates and pd.to_datetime(texts, errors="coerce", utc=True).notna().all() else CATEGORY


def _typed(values: pd.Series, column: Column) -> pd.Series:
    """Raise UserError where a column of numbers or times now holds texts."""
    if column.kind == CATEGORY or not len(values.dropna()) or kind_of(values) == column.kind:
        return values
    raise UserError(f"The column {column.name} holds {kind_of(values)} values, and held {column.kind} values in training.")


def _numbers(values: pd.Series, kind: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    """``[rows, 1]`` numbers, or days, day of the year and weekday of times; NaN where missing."""
    import pandas as pd

    if kind == NUMBER:
        return pd.to_numeric(values.astype(object), errors="coerce").to_numpy(dtype=np.float64, na_value=math.nan)[:, None]
    times = pd.to_datetime(values, utc=True).dt.as_unit("ns")
    days = np.where(times.isna(), np.nan, times.astype("int64").to_numpy() / DAY)
    parts = [days, times.dt.day_of_year.to_numpy(dtype=np.float64), times.dt.day_of_week.to_numpy(dtype=np.float64)]
    return np.stack(parts, axis=1)


def text_of(value: Any) -> str:
    """A category as text; whole numbers that a column with gaps holds as floats read as whole ones."""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)
