"""Tables that ship with packages, and the ways in which a table cannot be learnt."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn import datasets

import esper
from esper.errors import UserError
from esper.tasks.base import SETS, Task
from esper.tasks.config import TableConfig
from esper.tasks.table_columns import Preprocessing, kind_of, read_preprocessing, text_of
from tests.here import here


def frame_of(name: str) -> tuple[pd.DataFrame, str]:
    """A real table and its target."""
    if name == "wine":
        return datasets.load_wine(as_frame=True).frame, "target"
    if name == "diabetes":
        return datasets.load_diabetes(as_frame=True, scaled=False).frame, "target"
    if name in ("cars", "weather"):
        from vega_datasets import data

        return (data.cars(), "Origin") if name == "cars" else (data.seattle_weather(), "weather")
    from statsmodels.datasets import anes96, fair, randhie

    found = {"fair": (fair, "affairs"), "randhie": (randhie, "mdvis"), "anes96": (anes96, "vote")}[name]
    return found[0].load_pandas().data, found[1]


def bottles() -> pd.DataFrame:
    """The table of wines with gaps, categories, dates, a constant and a key."""
    frame = frame_of("wine")[0]
    made = pd.DataFrame(
        {
            "alcohol": frame["alcohol"].where(frame.index % 7 != 0),
            "shade": frame["hue"].map(lambda hue: "dark" if hue < 0.8 else "red" if hue < 1.1 else None),
            "sold": pd.date_range("2020-01-01", periods=len(frame), freq="D").astype(str),
            "same": "x",
            "key": [f"bottle {number}" for number in frame.index],
            "kind": frame["target"].map({0: "barolo", 1: "grignolino", 2: "barbera"}),
        }
    )
    return made.sample(frac=1.0, random_state=0).reset_index(drop=True)


def task_of(frame: pd.DataFrame, target: str, folder: Path, ending: str = "csv", **settings: object) -> Task:
    path = folder / f"data.{ending}"
    frame.to_csv(path, index=False) if ending == "csv" else frame.to_parquet(path)
    return TableConfig(path=str(path), target=target, **settings).build()  # type: ignore[arg-type]


def prepared(task: Task, folder: Path) -> Preprocessing:
    (folder / "preprocessing.json").write_text(json.dumps(task.preprocessing))
    return read_preprocessing(folder)


@pytest.mark.parametrize(
    ("name", "primary", "outputs"),
    [
        ("wine", "accuracy", 3),
        ("diabetes", "explained", 1),
        ("fair", "explained", 1),
        ("randhie", "explained", 1),
        ("anes96", "accuracy", 2),
        ("cars", "accuracy", 3),
        ("weather", "accuracy", 5),
    ],
)
def test_a_real_table_becomes_four_disjoint_sets_with_finite_inputs(name: str, primary: str, outputs: int, tmp_path: Path) -> None:
    frame, target = frame_of(name)
    frame["row"] = np.arange(len(frame))
    task = task_of(frame, target, tmp_path)
    assert (task.primary, task.outputs) == (primary, outputs)
    sizes = {which: len(getattr(task, which)) for which in SETS}
    assert sum(sizes.values()) == len(frame) and sizes["train"] > 2 * sizes["test"]
    rows = torch.cat([getattr(task, which).inputs[:, -1] for which in SETS])  # the number of the row
    assert len(rows.unique()) == len(frame), "no row is in two sets"
    for which in SETS:
        assert getattr(task, which).inputs.isfinite().all()
    assert abs(float(task.train.inputs[:, -1].mean())) < 1e-3 and abs(float(task.train.inputs[:, -1].std(correction=0)) - 1) < 1e-2


def test_missing_values_categories_and_dates_become_numbers_by_the_training_rows_alone(tmp_path: Path) -> None:
    task = task_of(bottles(), "kind", tmp_path)
    columns = {one.name: one for one in prepared(task, tmp_path).columns}
    assert {name: one.kind for name, one in columns.items()} == {"alcohol": "number", "shade": "category", "sold": "time"}
    assert columns["alcohol"].missing and columns["shade"].missing and columns["shade"].categories == ["red", "dark"]
    assert "same (the same in every training row)" in task.description and "key (a different text in nearly every row)" in task.description
    assert task.input_shape == (1 + 1 + 2 + 1 + 3,)
    kinds = task.train.inputs[:, 2:5]
    assert (kinds.sum(1) == 1).all(), "a category, or missing"
    config = TableConfig(path=str(tmp_path / "data.csv"), target="kind")
    alike = bottles()
    held = ~alike.index.isin(train_rows(task, alike))
    alike.loc[held, "alcohol"] = 1e6
    alike.to_csv(tmp_path / "data.csv", index=False)
    other = config.build()
    assert torch.equal(other.train.inputs, task.train.inputs) and other.preprocessing == task.preprocessing
    assert not torch.equal(other.test.inputs, task.test.inputs) and other.digest != task.digest


def train_rows(task: Task, frame: pd.DataFrame) -> list[int]:
    """The rows of the training set, found by their day."""
    days = pd.to_datetime(frame["sold"]).astype("int64").rank(method="dense").to_numpy()
    found = torch.cat([getattr(task, which).inputs[:, 5] for which in SETS])
    order = found.unique().sort().values
    place = {float(value): rank + 1 for rank, value in enumerate(order)}
    ranks = {place[float(value)] for value in task.train.inputs[:, 5]}
    return [row for row, rank in enumerate(days) if rank in ranks]


def test_csv_and_parquet_give_the_same_and_only_the_split_seed_makes_other_sets(tmp_path: Path) -> None:
    frame, target = frame_of("wine")
    one, two = task_of(frame, target, tmp_path), task_of(frame, target, tmp_path, "parquet")
    assert torch.equal(one.train.inputs, two.train.inputs) and torch.equal(one.test.targets, two.test.targets)
    other = task_of(frame, target, tmp_path, split_seed=1)
    assert not torch.equal(one.test.inputs, other.test.inputs)


def test_rare_categories_are_one_and_numbers_can_be_names(tmp_path: Path) -> None:
    frame, target = frame_of("wine")
    frame["code"] = np.arange(len(frame)) % 5
    frame["many"] = [f"c{row % 50 if row % 2 else 0}" for row in range(len(frame))]
    task = task_of(frame, target, tmp_path, categories=["code"], most_categories=3)
    columns = {one.name: one for one in prepared(task, tmp_path).columns}
    assert columns["code"].features == columns["many"].features == 4 and columns["many"].other and columns["many"].categories[0] == "c0"


def test_new_rows_are_prepared_by_the_file_and_a_prediction_is_in_the_targets_words(tmp_path: Path) -> None:
    task = task_of(bottles(), "kind", tmp_path)
    kept = prepared(task, tmp_path)
    new = pd.DataFrame({"sold": ["2021-03-04"], "shade": ["blue"], "alcohol": [None]})
    made = kept.inputs(new)
    assert made.shape == (1, 8) and made.isfinite().all() and made[0, 1] == 1.0 and made[0, 2:5].sum() == 0
    assert kept.predictions(torch.tensor([[0.0, 2.0, 1.0]])).tolist() == ["barolo"]
    with pytest.raises(UserError, match="no column shade"):
        kept.inputs(new.drop(columns="shade"))
    with pytest.raises(UserError, match="alcohol holds category values, and held number"):
        kept.inputs(new.assign(alcohol="strong"))
    with pytest.raises(UserError, match="does not exist"):
        read_preprocessing(tmp_path / "nowhere")
    (tmp_path / "preprocessing.json").write_text('{"columns": [{"name": 3}]}')
    with pytest.raises(UserError, match="cannot be read"):
        read_preprocessing(tmp_path)


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([True, False, None], "number"),
        ([1, 2, None], "number"),
        (["a", "b"], "category"),
        (["2020-01-01", "2021-02-03", None], "time"),
        (["2020-01-01", "soon"], "category"),
    ],
)
def test_what_a_column_holds(values: list[object], kind: str) -> None:
    assert kind_of(pd.Series(values)) == kind
    assert text_of(3.0) == "3" and text_of(3.5) == "3.5"


WINE = frame_of("wine")[0]


@pytest.mark.parametrize(
    ("frame", "settings", "sentence"),
    [
        (WINE, {"target": ""}, "needs task.target=<column>; the table has alcohol"),
        (WINE, {"target": "tarket"}, "no column tarket, .*did you mean target[?]"),
        (WINE, {"drop": ["sugar"]}, "task.drop: the table has no column sugar"),
        (WINE, {"separator": ";"}, "is task.separator right[?]"),
        (WINE.head(30), {}, "has 30 rows; four sets need at least 40"),
        (WINE.assign(target=WINE["target"].where(WINE.index > 3)), {}, "missing in 4 of 178 rows; remove"),
        (WINE.assign(target=[f"k{row}" for row in WINE.index]), {}, "178 of 178 classes with fewer than 4 rows, such as"),
        (WINE.assign(target=1), {}, "target is 1 in every row"),
        (WINE.assign(target=np.where(WINE.index > 90, "a", "b")), {"kind": "regression"}, "no number; use classification"),
        (WINE.assign(ash=np.inf), {}, "ash holds 178 infinite values"),
        (WINE, {"judge": 0.5, "validation": 0.5}, "every set needs 4"),
        (WINE[["target"]].assign(a=1), {}, "no column is left to learn target from"),
    ],
    ids=lambda value: str(value)[:20] if isinstance(value, str) else "",
)
def test_what_cannot_be_learnt_gets_a_sentence(frame: pd.DataFrame, settings: dict[str, object], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=sentence):
        task_of(frame, **{"target": "target", **settings}, folder=tmp_path)  # type: ignore[arg-type]


def test_a_file_that_is_no_table_gets_a_sentence(tmp_path: Path) -> None:
    for name, contents, sentence in (("a.csv", b"\xff\xfe\x00", "cannot be read as CSV"), ("a.parquet", b"x", "cannot be read as Parquet")):
        (tmp_path / name).write_bytes(contents)
        with pytest.raises(UserError, match=sentence):
            TableConfig(path=str(tmp_path / name), target="a").build()
    with pytest.raises(UserError, match="is no file"):
        TableConfig(path=str(tmp_path / "b.csv"), target="a").build()


@pytest.mark.parametrize(("name", "floor"), [("wine", 0.8), ("diabetes", 0.25)])
def test_a_run_learns_a_table_and_its_model_predicts_new_rows(name: str, floor: float, tmp_path: Path, whole_runs: None) -> None:
    frame, target = frame_of(name)
    frame.to_csv(tmp_path / "data.csv", index=False)
    words = ["task=table", f"task.path={tmp_path}/data.csv", f"task.target={target}", "trainer.steps=300", "optimizer.lr=0.01"]
    done = here(*words, "tracking=csv", "trainer.control=false", f"hydra.run.dir={tmp_path}/run", "tracking.figures=false")
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["metrics"]["final"][f"test/{summary['primary'].partition('/')[2]}"] > floor
    assert here("export", f"run={tmp_path}/run", f"to={tmp_path}/out", "format=safetensors").returncode == 0
    kept = read_preprocessing(tmp_path / "out")
    assert kept == read_preprocessing(tmp_path / "run")
    model = esper.load_model(tmp_path / "out").eval()
    with torch.no_grad():
        told = kept.predictions(model(kept.inputs(frame.drop(columns=target))))
    if name == "wine":
        assert (told.astype(int) == frame[target]).mean() > floor
    else:
        assert np.corrcoef(told, frame[target])[0, 1] > 0.6 and 100 < told.mean() < 200, "in the target's own unit"
