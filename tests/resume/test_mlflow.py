"""A killed and resumed run is one MLflow run with the history of an undisturbed one: no hole, no double."""

from __future__ import annotations

from pathlib import Path

from tests.resume import killing
from tests.resume.conftest import Configure

TRACKED = (
    "tracking=mlflow",
    "tracking.figures=false",
    "tracking.model=false",
    "tracking.system_s=0",
    "tracking.points=30",
    "trainer.steps=300",
)


def test_the_history_has_neither_hole_nor_double(configure: Configure, tmp_path: Path) -> None:
    folders = {}
    for name in ("whole", "killed"):
        folders[name] = tmp_path / name / "day" / "run"
        folders[name].mkdir(parents=True)
    config, log = configure(*TRACKED, f"output={tmp_path / 'whole'}"), tmp_path / "log"
    whole = killing.child(lambda: killing.start(config, folders["whole"]), log)
    assert whole.code == 0, log.read_text()
    config = configure(*TRACKED, f"output={tmp_path / 'killed'}")
    killed = killing.child(lambda: killing.start(config, folders["killed"]), log, kill_when=killing.reached(folders["killed"], 150))
    assert killed.code == -9
    assert killing.child(lambda: killing.go_on(config, folders["killed"]), log).code == 0, log.read_text()
    assert killing.differences(folders["killed"], folders["whole"]) == []
    assert killing.history(tmp_path / "whole")["runs"] == ["FINISHED"]
    assert killing.different_histories(tmp_path / "killed", tmp_path / "whole") == []
