"""A size found by itself, on real data: the path, the limits, the end, and Ctrl-C."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn import datasets

import esper
from esper.tasks.config import TableConfig
from esper.trainer.evaluation import evaluate, held_out
from tests.here import here

pytestmark = pytest.mark.usefixtures("whole_runs")


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The words for a real table: the wines of scikit-learn."""
    path = tmp_path_factory.mktemp("table") / "wine.csv"
    datasets.load_wine(as_frame=True).frame.to_csv(path, index=False)
    return f"task.path={path}"


def found(table: str, folder: Path, *words: str, code: int = 0) -> tuple[dict[str, Any], str]:
    """What a search left in its folder, and what it said."""
    done = here("auto", "task=table", table, "task.target=target", f"to={folder}", *words)
    assert done.returncode == code, done.stdout + done.stderr
    return (json.loads((folder / "auto.json").read_text()) if code == 0 else {}), done.stdout + done.stderr


@pytest.fixture(scope="module")
def searched(table: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    folder = tmp_path_factory.mktemp("auto") / "one"
    return folder, *found(table, folder, "budget=8e7macs", "seed=1")


def test_it_starts_small_keeps_what_pays_and_stays_within_its_budget(searched: tuple[Path, dict[str, Any], str]) -> None:
    folder, kept, said = searched
    attempts = kept["attempts"]
    assert {one["phase"] for one in attempts} == {"first", "settings", "grow"}
    path = [attempts[number] for number in kept["path"]]
    assert path[0]["number"] == 0 and [one["kept"] for one in attempts].count(True) == len(path)
    assert all(later["quality"] > earlier["quality"] or later["loss"] < earlier["loss"] for earlier, later in pairwise(path))
    best = max(one["quality"] for one in attempts if one["state"] == "finished")
    assert kept["best"]["attempt"] == path[-1]["number"] and best < path[-1]["quality"] + 0.05
    assert kept["spent"] == sum(one["macs"] for one in attempts) <= 8e7
    assert "the path: accuracy on validation" in said and "It ended because" in said
    assert (folder / "path.png").stat().st_size > 10_000 and "It ended because" in (folder / "auto.txt").read_text()


def test_the_model_that_is_left_is_the_one_that_was_measured(searched: tuple[Path, dict[str, Any], str], table: str) -> None:
    folder, kept, _ = searched
    task = TableConfig(path=table.removeprefix("task.path="), target="target").build()
    model = esper.load_model(folder / "model")
    right = {which: evaluate(model, task, held_out(task, which, torch.device("cpu")))["accuracy"] for which in ("validation", "judge")}
    rows = {which: len(getattr(task, which)) for which in right}
    measured = sum(right[which] * rows[which] for which in rows) / sum(rows.values())
    best = kept["attempts"][kept["best"]["attempt"]]
    assert measured == pytest.approx(best["quality"]) and sum(one.numel() for one in model.parameters()) == best["parameters"]
    assert evaluate(model, task, held_out(task, "test", torch.device("cpu"))) == pytest.approx(kept["test"])
    assert (folder / "model" / "preprocessing.json").exists()


def test_the_test_set_is_looked_at_once_at_the_end(searched: tuple[Path, dict[str, Any], str]) -> None:
    folder, kept, said = searched
    summaries = [path.read_text() for path in folder.glob("attempts/*/summary.json")]
    assert len(summaries) >= 6 and not any('"test/' in text for text in summaries)
    assert f"{kept['test']['accuracy']:.4g} on the test set" in said


def test_with_a_budget_of_macs_the_same_words_find_the_same(searched: tuple[Path, dict[str, Any], str], table: str, tmp_path: Path) -> None:
    again, _ = found(table, tmp_path / "again", "budget=8e7macs", "seed=1")
    timed = ("seconds", "folder", "why")
    bare = [[{key: value for key, value in one.items() if key not in timed} for one in kept["attempts"]] for kept in (again, searched[1])]
    assert bare[0] == bare[1] and again["path"] == searched[1]["path"]


def test_no_model_is_larger_than_allowed_and_where_nothing_pays_it_stops(table: str, tmp_path: Path) -> None:
    kept, said = found(table, tmp_path / "a", "budget=1e10macs", "max_parameters=700", "gain=1", "search=0", "trainer.validate_every=20%")
    assert "nothing pays any more" in kept["ended"] and kept["spent"] < 1e10
    grown = [one for one in kept["attempts"] if one["phase"] == "grow"]
    assert {one["state"] for one in grown} <= {"too large", "finished"} and any(one["state"] == "too large" for one in grown)
    assert "max_parameters=700" in said and kept["path"] == [0]


def test_what_cannot_even_begin_gets_a_sentence(table: str, tmp_path: Path) -> None:
    said = found(table, tmp_path / "a", "budget=1e5macs", code=2)[1]
    assert re.search(r"is spent before the first model has made 100 steps: [1-9]\d? of them took [\d.e+]+ MACs", said), said
    said = found(table, tmp_path / "a", "budget=1e9macs", "max_parameters=10", code=2)[1]  # the same folder: what is refused leaves nothing
    assert "allow more parameters, or give a smaller model: model.width=…" in said and not [*(tmp_path / "a").iterdir()]
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "mine").touch()
    assert "has files in it already" in found(table, tmp_path / "c", "budget=1e9macs", code=2)[1]


@pytest.mark.parametrize(
    ("own", "budget"),
    [
        (("task=custom", "task.target=my_pkg.data:waves"), "3e7macs"),
        (("task=digits", "model=custom", "model.target=my_pkg.nets:MyNet", "sites.match=[fc1,fc2]"), "2.5e8macs"),
    ],
    ids=("task", "model"),
)
def test_the_users_own_task_and_model_grow_too(
    own: tuple[str, ...], budget: str, checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(checkout / "docs" / "examples"))
    monkeypatch.setenv("ESPER_ALLOW", "my_pkg")
    done = here("auto", *own, f"budget={budget}", "search=0.1", f"to={tmp_path / 'own'}")
    assert done.returncode == 0, done.stdout + done.stderr
    kept = json.loads((tmp_path / "own" / "auto.json").read_text())
    grown = {one["what"] for one in kept["attempts"] if one["phase"] == "grow" and one["state"] == "finished"}
    assert "width" in grown and len(kept["path"]) > 1 and kept["test"], done.stdout


def test_ctrl_c_keeps_the_best_model_so_far(table: str, tmp_path: Path, checkout: Path, processes: None) -> None:
    folder = tmp_path / "stopped"
    command = [sys.executable, "-m", "esper", "auto", "task=table", table, "task.target=target", "budget=1h", f"to={folder}"]
    process = subprocess.Popen(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(checkout)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    deadline = time.monotonic() + 240
    while not (folder / "auto.json").exists() or len(json.loads((folder / "auto.json").read_text())["attempts"]) < 2:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130 and f"ended by Ctrl-C; what there is so far lies in {folder}" in err and "Traceback" not in err, err
    kept = json.loads((folder / "auto.json").read_text())
    assert kept["ended"] == "it was stopped" and "It ended because it was stopped" in out
    assert esper.load_model(folder / "model") is not None and (folder / "path.png").exists()
