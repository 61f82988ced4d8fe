"""A bandit in whole runs: the same bits after a resume, explanations in the tables, and a memory that later runs begin with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from growing import SHORT_LIVES

from esper.checkpoint import disk
from esper.cli.compose import compose
from esper.cli.resume import resume
from esper.compare.fingerprint import same_bits
from esper.controllers.memory import FILE, read_experiment, read_file
from esper.errors import UserError
from esper.report.summary_file import read_summary
from esper.running.run import run
from esper.tracking.config import sqlite_uri
from tests.resume.conftest import copied

pytestmark = pytest.mark.usefixtures("whole_runs")

#: A run of 80 steps in which branches live for about 15, so that lives end before the checkpoint from which it is resumed.
SHORT = [
    "controller=bandit",
    "controller.germinate_at=5%",
    "controller.every=5%",
    "controller.until=90%",
    "controller.embargo=2%",
    *SHORT_LIVES,
]


def config(tmp_path: Path, *words: str) -> Any:
    return compose([*SHORT, f"output={tmp_path}", *(words or ("tracking=none",))])


def test_killed_and_resumed_it_decides_the_same_and_what_it_began_with_stays(tmp_path: Path):
    (tmp_path / "whole").mkdir()
    memory = tmp_path / "memory.json"
    words = ("tracking=none", f"controller.memory={memory}", "trainer.checkpoint_every=10%")
    run(config(tmp_path / "first", *words, "seed=7"), tmp_path / "first" / "day" / "run", quiet=True)
    began_with = read_file(memory)
    assert began_with.n > 0
    whole = tmp_path / "whole" / "day" / "run"
    run(config(tmp_path / "whole", *words), whole, quiet=True)
    assert read_file(memory).n == began_with.n + read_file(whole / FILE).n
    folder = copied(whole, tmp_path / "again", until=40)
    assert int(disk.checkpoints(folder / disk.FOLDER)[-1].name) <= 40
    (folder / FILE).unlink()
    start = resume(folder)
    run(start.config, start.folder, quiet=True, state=start.state)
    assert read_summary(folder)["seeds"]["germinated"] > 3 and same_bits(folder, whole)
    assert json.loads((folder / FILE).read_text()) == json.loads((whole / FILE).read_text())
    table, other = (pq.read_table(place / "transitions.parquet") for place in (folder, whole))
    assert table.equals(other)
    whys = [json.loads(why) for why in table.column("why").to_pylist() if why]
    assert len(whys) == read_summary(folder)["seeds"]["germinated"] and all(why["features"] and why["probabilities"] for why in whys)
    assert {one for one in table.column("objective").to_pylist() if one} <= {"shadow", "functional_gradient"}


@pytest.mark.usefixtures("heavy_libraries", "processes")
def test_an_mlflow_experiment_is_a_memory(tmp_path: Path):
    quick = ("tracking=mlflow", "tracking.figures=false", "tracking.model=false", "tracking.system_s=0", "tracking.experiment=study")
    words = (*quick, "controller.memory=study")
    uri = sqlite_uri(tmp_path / "mlflow.db")
    run(config(tmp_path, *words), tmp_path / "day" / "first", quiet=True)
    known = read_experiment(uri, "study")
    assert known.n > 0 and known.n == read_file(tmp_path / "day" / "first" / FILE).n
    run(config(tmp_path, *words, "seed=1"), tmp_path / "day" / "second", quiet=True)
    first = json.loads(next(one for one in pq.read_table(tmp_path / "day" / "second" / "transitions.parquet")["why"].to_pylist() if one))
    assert first["observations"] == known.n
    assert read_experiment(uri, "study").n == known.n + read_file(tmp_path / "day" / "second" / FILE).n
    assert read_experiment(uri, "another").n == 0


def test_an_experiment_without_a_store_is_refused_before_training(tmp_path: Path):
    with pytest.raises(UserError, match="is an MLflow experiment, which needs tracking=mlflow"):
        run(config(tmp_path, "tracking=none", "controller.memory=study"), tmp_path / "run", quiet=True)
    with pytest.raises(UserError, match="there is no folder"):
        run(config(tmp_path, "tracking=none", "controller.memory=nowhere/memory.json"), tmp_path / "run", quiet=True)


def test_local_controllers_elsewhere_need_a_bus_that_they_can_reach(tmp_path: Path):
    words = ("tracking=none", "controller=hierarchical", "controller.remote=[fc1]")
    short = [word for word in SHORT if not word.startswith("controller")]
    with pytest.raises(UserError, match=r"choose controller\.process=internal, and bus=embedded"):
        run(compose([*short, f"output={tmp_path}", *words]), tmp_path / "run", quiet=True)
