"""Tables, and exports of W&B and trackio in the forms that these programs write."""

from __future__ import annotations

import json
import shutil
import sqlite3
from pathlib import Path

import pandas as pd
import pytest

from esper.compare.sources.open_store import opened
from esper.compare.sources.selection import Gathered, Selection, gather
from esper.errors import UserError

SAMPLES = Path(__file__).parent / "samples"


def gathered(store: Path, direction: str = "max", **columns: object) -> Gathered:
    chosen = Selection(**columns)  # type: ignore[arg-type]
    with opened(str(store), (), chosen.wanted) as table:
        return gather(table, chosen, direction)


def by_place(found: Gathered) -> dict[tuple[str, object], float]:
    return {(run.arm, run.seed): run.value for run in found.runs}


def test_a_table_with_a_row_a_run(tmp_path: Path) -> None:
    rows = "lr,seed,acc,status\n0.10,1,0.8,finished\n0.1,2,0.7,FINISHED\n0.02,1.0,0.9,crashed\n0.02,2,,finished\n0.02,3,0.5,running\n"
    for name, text in (("a.csv", rows), ("a.tsv", rows.replace(",", "\t"))):
        (tmp_path / name).write_text(text)
        found = gathered(tmp_path / name, arm=("lr",), pair="seed", metric="acc")
        assert list(found.arms) == ["lr=0.02", "lr=0.1"] and found.seeds == (1, 2)
        assert {place for place, value in by_place(found).items() if value != value} == {("lr=0.02", 2)}
        assert [(run.arm, run.seed) for run in found.runs if run.failed] == [("lr=0.02", 1), ("lr=0.02", 2)]
        assert found.notes == ["Runs that are under way or were stopped are left out: 1."]
    frame = pd.read_csv(tmp_path / "a.csv")
    frame.to_parquet(tmp_path / "a.parquet")
    assert repr(gathered(tmp_path / "a.parquet", arm=("lr",), pair="seed", metric="acc").runs) == repr(found.runs)


def test_a_table_with_a_row_a_step_gives_the_last_the_best_or_a_step(tmp_path: Path) -> None:
    rows = [("a", 0, step, value) for step, value in ((3, 0.6), (1, 0.9), (2, 0.7))] + [("b", 0, 1, 0.5)]
    pd.DataFrame(rows, columns=["arm", "seed", "step", "acc"]).to_csv(tmp_path / "s.csv", index=False)
    columns = {"arm": ("arm",), "pair": "seed", "metric": "acc", "step": "step"}
    for take, value in (("last", 0.6), ("best", 0.9), ("2", 0.7), ("7", 0.6)):
        assert by_place(gathered(tmp_path / "s.csv", take=take, **columns))["a", 0] == value
    assert by_place(gathered(tmp_path / "s.csv", "min", take="best", **columns))["a", 0] == 0.6
    assert all(run.failed for run in gathered(tmp_path / "s.csv", take="0", **columns).runs)  # nothing was logged by then
    curves = gathered(tmp_path / "s.csv", **columns).curves
    assert curves is not None and list(curves[curves["arm"] == "a"]["step"]) == [1, 2, 3]
    with pytest.raises(UserError, match="nothing says which rows are one run; name its column: run=…"):
        gathered(tmp_path / "s.csv", arm=("arm",), metric="acc", step="step")


def test_the_names_of_runs_are_taken_apart(tmp_path: Path) -> None:
    rows = [(f"grow-{arm}/seed{seed}", 0.5) for arm in "ab" for seed in (0, 1)] + [("notes", 0.1)]
    pd.DataFrame(rows, columns=["run_name", "acc"]).to_csv(tmp_path / "n.csv", index=False)
    found = gathered(tmp_path / "n.csv", arm=("name.arm",), pair="name.seed", metric="acc", names="grow-{arm}/seed{seed}")
    assert set(by_place(found)) == {("a", 0), ("a", 1), ("b", 0), ("b", 1)}
    assert found.notes == ["Runs without name.arm (arm) are left out: 1."]
    for pattern, words in (("{arm}-{arm}", "each part once"), ("plain", "each part once"), ("{a}:{b}", "fits none of the names")):
        with pytest.raises(UserError, match=words):
            gathered(tmp_path / "n.csv", arm=("name.arm",), metric="acc", names=pattern)


def test_the_runs_table_that_wandb_exports(tmp_path: Path) -> None:
    (tmp_path / "w.csv").write_text(
        '"Name","State","Notes","User","Tags","Created","Runtime","Sweep","lr","seed","_step","val_acc"\n'
        '"fresh-1","finished","-","ann","","2026-03-01T10:00:00.000Z","61","","0.1","0","99","0.81"\n'
        '"fresh-2","crashed","-","ann","","2026-03-01T11:00:00.000Z","12","","0.01","0","9","0.99"\n'
        '"fresh-3","running","-","ann","","2026-03-01T12:00:00.000Z","12","","0.01","1","9","0.5"\n'
    )
    found = gathered(tmp_path / "w.csv", arm=("lr",), pair="seed", metric="val_acc")
    good, bad = sorted(found.runs, key=lambda run: run.failed)
    assert (good.arm, good.value, good.costs, bad.arm, bad.failed) == ("lr=0.1", 0.81, {"seconds": 61.0}, "lr=0.01", True)
    assert found.started["fresh-1"] == pd.Timestamp("2026-03-01T10:00:00Z").timestamp()


def test_the_chart_that_wandb_exports(tmp_path: Path) -> None:
    lines = [f"{arm}-s{seed} - val/acc" for arm in ("adam", "sgd") for seed in (0, 1)]
    columns = ["Step", *(name + end for name in lines for end in ("", "__MIN", "__MAX"))]
    rows = [[step, *(value for i in range(4) for value in [None if step == 2 and i == 3 else 0.1 * i + step] * 3)] for step in range(3)]
    pd.DataFrame(rows, columns=columns).to_csv(tmp_path / "c.csv", index=False)
    found = gathered(tmp_path / "c.csv", arm=("name.opt",), pair="name.seed", metric="val/acc", names="{opt}-s{seed}")
    assert by_place(found) == pytest.approx({("adam", 0): 2.0, ("adam", 1): 2.1, ("sgd", 0): 2.2, ("sgd", 1): 1.3})


def test_what_wandbs_documentation_exports_with_its_api(tmp_path: Path) -> None:
    runs = [
        ("a", {"lr": 0.1, "net": {"width": 8}}, {"acc": 0.5, "_runtime": 4, "_timestamp": 1_644_345_412}),
        ("b", {"lr": 0.2}, {"acc": 0.7}),
    ]
    frame = pd.DataFrame({"summary": [s for _, _, s in runs], "config": [c for _, c, _ in runs], "name": [n for n, _, _ in runs]})
    frame.to_csv(tmp_path / "project.csv")
    found = gathered(tmp_path / "project.csv", arm=("config.lr",), metric="summary.acc")
    assert by_place(found) == {("lr=0.1", 0): 0.5, ("lr=0.2", 0): 0.7}
    assert found.started == {"a": 1_644_345_408.0}
    (tmp_path / "project.csv").write_text('summary,config,name\n__import__("os"),{},a\n')
    with pytest.raises(UserError, match=r"Row 1 of .*project\.csv has no dictionary in summary"):
        gathered(tmp_path / "project.csv", arm=("lr",), metric="acc")


@pytest.mark.parametrize("kind", ["parquet", "database"])
def test_a_project_of_trackio(tmp_path: Path, kind: str) -> None:
    store = SAMPLES / "demo.parquet"
    if kind == "database":
        store = tmp_path / "demo.db"
        metrics, configs = pd.read_parquet(SAMPLES / "demo.parquet"), pd.read_parquet(SAMPLES / "demo_configs.parquet")
        with sqlite3.connect(store) as made:
            made.execute("CREATE TABLE metrics (id INTEGER, run_id TEXT, timestamp TEXT, run_name TEXT, step INTEGER, metrics TEXT)")
            made.execute("CREATE TABLE configs (id INTEGER, run_id TEXT, run_name TEXT, config TEXT, created_at TEXT)")
            for row in metrics.itertuples():
                values = json.dumps({"val_acc": row.val_acc, "loss": row.loss})
                made.execute(
                    "INSERT INTO metrics VALUES (?,?,?,?,?,?)", (row.id, row.run_id, row.timestamp, row.run_name, row.step, values)
                )
            for row in configs.itertuples():
                values = json.dumps({"lr": row.lr, "seed": row.seed, "opt": {"name": "adam"}})
                made.execute("INSERT INTO configs VALUES (?,?,?,?,?)", (row.id, row.run_id, row.run_name, values, row.created_at))
    found = gathered(store, arm=("config.lr",), pair="seed", metric="val_acc", take="1", filter="config.opt.name = 'adam'")
    assert by_place(found) == pytest.approx({(f"lr={lr}", s): 0.55 + 0.1 * (lr == 0.1) + 0.01 * s for lr in (0.1, 0.01) for s in range(6)})
    assert len(found.started) == 12 and found.curves is not None and len(found.curves) == 36


def test_a_project_of_trackio_without_its_configurations_says_which_file_is_missing(tmp_path: Path) -> None:
    shutil.copy(SAMPLES / "demo.parquet", tmp_path)
    with pytest.raises(UserError, match=r"demo_configs\.parquet is missing, in which trackio keeps the configurations"):
        gathered(tmp_path / "demo.parquet", arm=("lr",), metric="val_acc")


def test_what_is_no_source_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("")
    (tmp_path / "y.parquet").write_text("no table")
    (tmp_path / "z.db").write_text("no database at all, and long enough to be taken for one")
    (tmp_path / "folder").mkdir()
    for name, words in (
        ("none.csv", "There is no file .*none.csv"),
        ("nothing", "There is nothing at store=.*nothing; give an MLflow store"),
        ("x.csv", "The table .*x.csv cannot be read"),
        ("y.parquet", "The table .*y.parquet cannot be read"),
        ("z.db", "is no database that can be read"),
        ("folder", "is no source of runs that esper knows"),
    ):
        with pytest.raises(UserError, match=words):
            gathered(tmp_path / name, arm=("lr",), metric="acc")


def test_columns_are_found_by_their_short_names_and_missed_with_the_nearest(tmp_path: Path) -> None:
    pd.DataFrame({"params.lr": [1, 2], "tags.lr": [1, 2], "metrics.val_acc": [0.1, 0.2]}).to_csv(tmp_path / "t.csv", index=False)
    assert len(gathered(tmp_path / "t.csv", arm=("params.lr",), metric="val_acc").runs) == 2
    with pytest.raises(UserError, match=r"arm=lr may be params\.lr or tags\.lr"):
        gathered(tmp_path / "t.csv", arm=("lr",), metric="val_acc")
    with pytest.raises(UserError, match=r"metric=val_ac is nothing that .* have; .*; did you mean metrics\.val_acc\?"):
        gathered(tmp_path / "t.csv", arm=("params.lr",), metric="val_ac")


def test_filters_are_conditions_that_all_hold(tmp_path: Path) -> None:
    frame = pd.DataFrame(
        {"arm": list("aabb"), "net": ["cnn", "mlp", "cnn", "cnn"], "deep thought": [1, 20, 3, None], "acc": [0.1, 0.2, 0.3, 0.4]}
    )
    frame.to_csv(tmp_path / "f.csv", index=False)

    def kept(text: str) -> list[float]:
        return [run.value for run in gathered(tmp_path / "f.csv", arm=("arm",), metric="acc", filter=text).runs]

    assert kept("net = 'cnn'") == kept("net=cnn and acc < 1") == [0.1, 0.3, 0.4]
    assert kept("net != cnn AND `deep thought` >= 9") == [0.2]
    assert kept("`deep thought` <= 3") == [0.1, 0.3]  # nothing holds for a value that is missing
    for text, words in (
        ("net", "cannot be read"),
        ("net = cnn or acc > 1", "cannot be read"),
        ("nett = cnn", "did you mean net[?]"),
        ("acc > 9", "No run"),
    ):
        with pytest.raises(UserError, match=words):
            kept(text)


def test_a_run_of_a_pair_that_is_missing_follows_the_rule(tmp_path: Path) -> None:
    pd.DataFrame({"arm": list("aab"), "fold": ["x", 1, "x"], "acc": [0.1, 0.2, 0.3]}).to_csv(tmp_path / "m.csv", index=False)
    columns = {"arm": ("arm",), "pair": "fold", "metric": "acc"}
    assert [(run.arm, run.seed) for run in gathered(tmp_path / "m.csv", **columns).runs] == [("a", "x"), ("a", "1"), ("b", "x")]
    lost = gathered(tmp_path / "m.csv", missing="lost", **columns).runs[-1]
    assert (lost.arm, lost.seed, lost.failed) == ("b", "1", True)
    with pytest.raises(UserError, match=r"Runs are missing: b pair 1 \(1 in all\); run them, or set missing=leave or missing=lost"):
        gathered(tmp_path / "m.csv", missing="refuse", **columns)
