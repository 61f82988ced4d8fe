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


def history(output: Path) -> dict[str, list[tuple[int, int, float]]]:
    """(step, timestamp since the run began, value) of every metric of the only run; values a clock gave are left out."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{output}/mlflow.db")
    runs = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    assert len(runs) == 1 and runs[0].info.status == "FINISHED"
    began = runs[0].info.start_time
    return {
        name: sorted(
            (point.step, point.timestamp - began, 0.0 if "second" in name else point.value)
            for point in client.get_metric_history(runs[0].info.run_id, name)
        )
        for name in runs[0].data.metrics
    }


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
    assert history(tmp_path / "killed") == history(tmp_path / "whole")
