"""A table of the user's own: every row a sample, one column the target, from CSV or Parquet."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from esper.config import did_you_mean, listing
from esper.errors import UserError
from esper.tasks.base import SETS, Batch, InMemory, Metric, Task, digest_of, logits, ready
from esper.tasks.classification import correct, sample_loss, stratified
from esper.tasks.config import TableConfig
from esper.tasks.table_columns import CLASSIFICATION, REGRESSION, Preprocessing, Target, fit, text_of

if TYPE_CHECKING:
    import pandas as pd

FEWEST = 40  # rows
EACH = 4  # rows of a class: one for each set
CLASSES = 20  # whole numbers with no more different values than this, each in many rows, are classes
BINS = 10  # of a regression's target, so that each set has its share of small and large ones
PARQUET = (".parquet", ".pq")


def build(config: TableConfig) -> Task:
    """Read the table, divide its rows, and fit the preprocessing on the training rows.

    Raises:
        UserError: a file that cannot be read, a column that is not there, a target that cannot be learnt.
    """
    frame = _chosen(config, read_table(config))
    kind = _kind(config, frame[config.target])
    parts = _parts(config, frame, kind)
    rows = {which: frame.iloc[part.numpy()] for which, part in parts.items()}
    target = _target(config, rows["train"][config.target], frame[config.target], kind)
    prepared, left = fit(rows["train"], target, config.categories, config.most_categories)
    if not prepared.columns:
        raise UserError(f"task.path={config.path}: no column is left to learn {config.target} from ({_told(left)}).")
    return _task(config, rows, prepared, left)


def read_table(config: TableConfig) -> pd.DataFrame:
    """The table as it is in the file.

    Raises:
        UserError: no such file, or one that cannot be read.
    """
    import pandas as pd
    import pyarrow as pa

    path = Path(config.path).expanduser()
    if not config.path or not path.is_file():
        raise UserError(f"task.path={config.path or '(empty)'} is no file; give a table as .csv or .parquet.")
    try:
        if path.suffix.lower() in PARQUET:
            return pd.read_parquet(path)
        return pd.read_csv(path, sep=config.separator)
    except (ValueError, UnicodeError, pa.ArrowException) as error:
        why = " ".join(str(error).split())[:200]
        raise UserError(f"{path} cannot be read as {'Parquet' if path.suffix.lower() in PARQUET else 'CSV in UTF-8'}: {why}.") from error


def _chosen(config: TableConfig, frame: pd.DataFrame) -> pd.DataFrame:
    """The target and the columns to learn from."""
    frame = frame.set_axis([str(name) for name in frame.columns], axis=1)
    names = list(frame.columns)
    if not config.target:
        raise UserError(f"task=table needs task.target=<column>; the table has {listing(names)}.")
    for key, given in (("target", [config.target]), ("columns", config.columns), ("drop", config.drop), ("categories", config.categories)):
        for name in given:
            if name not in names:
                otherwise = "; is task.separator right?" if len(names) == 1 else "."
                near = did_you_mean(name, names, otherwise=otherwise)
                raise UserError(f"task.{key}: the table has no column {name}, but {listing(names)}{near}")
    if len(set(names)) < len(names):
        raise UserError(f"{config.path} has two columns of the same name; rename one.")
    kept = [name for name in (config.columns or names) if name not in config.drop and name != config.target]
    if gone := int(frame[config.target].isna().sum()):
        raise UserError(f"The target {config.target} is missing in {gone} of {len(frame)} rows; remove these rows.")
    if len(frame) < FEWEST:
        raise UserError(f"{config.path} has {len(frame)} rows; four sets need at least {FEWEST}.")
    for name in kept:
        values = frame[name]
        if values.dtype.kind == "f" and int(bad := (values.abs() == float("inf")).sum()):
            raise UserError(f"The column {name} holds {int(bad)} infinite values; replace or remove them.")
    return frame[[*kept, config.target]]


def _kind(config: TableConfig, values: pd.Series) -> str:
    """Classification or regression, as asked or as the target looks.

    Raises:
        UserError: a regression of what is no number, or classes with too few rows.
    """
    from pandas.api import types

    number = types.is_numeric_dtype(values) and not types.is_bool_dtype(values)
    few = values.nunique() <= min(CLASSES, len(values) // 20)
    whole = number and bool((values == values.round()).all())
    kind = config.kind if config.kind != "auto" else REGRESSION if number and not (whole and few) else CLASSIFICATION
    if kind == REGRESSION and not number:
        raise UserError(f"task.kind=regression: the target {config.target} holds '{values.iloc[0]}', no number; use classification.")
    if values.nunique() < 2:
        raise UserError(f"The target {config.target} is {values.iloc[0]} in every row; there is nothing to learn.")
    if kind == REGRESSION and not bool(torch.tensor(values.to_numpy(dtype=float)).isfinite().all()):
        raise UserError(f"The target {config.target} holds infinite values; remove these rows.")
    if kind == CLASSIFICATION and (counts := values.value_counts()).min() < EACH:
        rare = counts[counts < EACH]
        raise UserError(
            f"The target {config.target} has {len(rare)} of {len(counts)} classes with fewer than {EACH} rows, such as '{rare.index[0]}'; "
            "each of the four sets needs one; take classes together, remove them, or set task.kind=regression where they are numbers."
        )
    return kind


def _parts(config: TableConfig, frame: pd.DataFrame, kind: str) -> dict[str, Tensor]:
    """The rows of every set: disjoint, with the classes, or the tenths of the target, in the proportions of the whole."""
    values = frame[config.target]
    ranks = values.rank(method="first").to_numpy(dtype=float) - 1
    codes = values.astype("category").cat.codes.to_numpy() if kind == CLASSIFICATION else ranks * BINS // len(values)
    shares = {"judge": config.judge, "validation": config.validation, "test": config.test}
    held = {which: round(len(frame) * share) for which, share in shares.items()}
    rest = len(frame) - sum(held.values())
    if min(*held.values(), rest) < EACH:
        told = ", ".join(f"{which} {count}" for which, count in held.items())
        raise UserError(f"{told} leave {rest} of {len(frame)} rows to train on, and every set needs {EACH}: change task.judge=… and so on.")
    sizes = {"train": rest, **held}
    made = stratified(torch.tensor(codes.astype("int64")), list(sizes.values()), config.split_seed)
    return dict(zip(sizes, made, strict=True))


def _target(config: TableConfig, train: pd.Series, whole: pd.Series, kind: str) -> Target:
    """Classes of all rows, or mean and deviation of the training rows."""
    if kind == CLASSIFICATION:
        return Target(config.target, kind, classes=[text_of(value) for value in sorted(whole.unique())])
    deviation = float(train.to_numpy(dtype=float).std())
    return Target(config.target, kind, mean=float(train.mean()), deviation=deviation or 1.0)


def _task(config: TableConfig, rows: dict[str, pd.DataFrame], prepared: Preprocessing, left: dict[str, str]) -> Task:
    import pandas as pd

    target = prepared.target
    data: dict[str, Any] = {which: InMemory(prepared.inputs(part), target.tensor(part[target.name])) for which, part in rows.items()}
    digests = [torch.from_numpy(pd.util.hash_pandas_object(rows[which], index=False).to_numpy().view("int64").copy()) for which in SETS]
    classes = target.kind == CLASSIFICATION
    what = f"{len(target.classes)} classes" if classes else "a number"
    sizes = ", ".join(f"{which} {len(rows[which])}" for which in SETS)
    omitted = f"; left out: {_told(left)}" if left else ""
    return Task(
        name=config.name,
        **data,
        collate=ready,
        sample_loss=sample_loss if classes else squared_error,
        metrics={"accuracy": Metric("max", correct)} if classes else _metrics(target),
        primary="accuracy" if classes else "explained",
        inputs="real",
        input_shape=(prepared.features,),
        outputs=len(target.classes) if classes else 1,
        digest=digest_of(digests),
        description=f"{Path(config.path).name}: {target.name} ({what}) from {len(prepared.columns)} columns{omitted}; {sizes}",
        preprocessing=prepared.plain(),
    )


def _told(left: dict[str, str]) -> str:
    return ", ".join(f"{name} ({why})" for name, why in left.items())


def _metrics(target: Target) -> dict[str, Metric]:
    return {
        "explained": Metric("max", explained),
        "absolute_error": Metric("min", partial(absolute_error, target.deviation)),
    }


def squared_error(output: Tensor, batch: Batch) -> Tensor:
    """Squared error of every sample in units of the training rows' variance, ``[N]``."""
    return (logits(output).reshape(-1) - batch[1]).square()


def explained(output: Tensor, batch: Batch) -> Tensor:
    """1 − squared error; its mean is the share of the training rows' variance that is explained (R² against their mean), ``[N]``."""
    return 1.0 - squared_error(output, batch)


def absolute_error(deviation: float, output: Tensor, batch: Batch) -> Tensor:
    """Absolute error in the target's own unit, ``[N]``."""
    return (logits(output).reshape(-1) - batch[1]).abs() * deviation
