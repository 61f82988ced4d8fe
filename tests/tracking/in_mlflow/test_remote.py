"""MLflow in a process of its own, with the final model, and the faults of either process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from stored_runs import LIGHT

from esper.errors import UserError
from esper.messages import Metrics
from esper.tracking import (
    MlflowConfig,
    NoneConfig,
    TrackerError,
    TrackerRunner,
    build_trackers,
)
from esper.tracking.final_model import write_model
from esper.tracking.remote import MlflowSubprocess

pytestmark = pytest.mark.usefixtures("heavy_libraries")


class Host(torch.nn.Module):
    """A model of this file alone: whoever loads the logged one does not have its code."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.layer(x))


def test_a_whole_run_through_the_bus_with_its_final_model(client, bus, info, story, publish):
    runner = TrackerRunner(bus, info, build_trackers(MlflowConfig(system_s=0.0)), poll_s=0.05)
    runner.start()
    publish(info.run, story(120))
    model, sample = Host(), torch.randn(1, 6)
    runner.log_model(model, sample)
    runner.close("FINISHED")
    note = json.loads((Path(info.folder) / "mlflow.json").read_text())
    found = client.get_run(note["run"])
    assert found.info.status == "FINISHED"
    assert found.data.metrics["final/accuracy"] == 0.91 and found.data.metrics["final/seeds/fossilized"] == 2.0
    assert [m.step for m in client.get_metric_history(note["run"], "train/loss")] == list(range(1, 121))
    assert "figures" in {item.path for item in client.list_artifacts(note["run"])}
    assert not (Path(info.folder) / "tracker.log").exists(), "nothing was printed"
    _the_logged_model_answers_like(model, note["uri"], found)


def _the_logged_model_answers_like(model: torch.nn.Module, uri: str, found) -> None:
    import mlflow

    mlflow.set_tracking_uri(uri)
    loaded = mlflow.pyfunc.load_model(f"models:/{found.outputs.model_outputs[0].model_id}")
    assert loaded.metadata.signature.inputs.inputs[0].shape == (-1, 6)
    inputs = np.random.default_rng(0).normal(size=(5, 6)).astype(np.float32)
    np.testing.assert_allclose(loaded.predict(inputs), model(torch.from_numpy(inputs)).detach().numpy(), rtol=1e-5, atol=1e-6)


def test_a_store_that_cannot_be_opened_is_an_error_of_the_tracker_not_of_training(bus, info, story, publish):
    runner = TrackerRunner(bus, info, build_trackers(MlflowConfig(uri="sqlite:////proc/none/mlflow.db", **LIGHT)), poll_s=0.05)
    runner.start()
    publish(info.run, story(20))
    with pytest.raises(UserError, match=r"cannot be opened \(unable to open database file\); see that it is there"):
        runner.await_open()
    with pytest.raises(TrackerError, match=r"^MLflow failed and keeps nothing more: .*\S$"):
        runner.close("FINISHED")
    assert (Path(info.folder) / "seeds.parquet").exists()
    assert not (Path(info.folder) / "tracker.log").exists(), "a sentence, and no traceback"


def test_a_tracking_process_that_dies_is_noticed(client, info):
    tracker = MlflowSubprocess(MlflowConfig(**LIGHT))
    tracker.open(info)
    tracker._process.kill()
    tracker._process.wait()
    with pytest.raises(TrackerError, match=r"tracking process .*tracker\.log"):
        tracker.record([Metrics(tick=1, values={"a": 1.0})])
        tracker.flush()
    with pytest.raises(TrackerError):
        tracker.close("FINISHED", {})


@pytest.mark.usefixtures("processes")
def test_a_trainer_killed_without_a_word_leaves_its_run_marked_killed(client, info):
    script = (
        "import sys, time, msgspec\n"
        "from esper.tracking import MlflowConfig, RunInfo\n"
        "from esper.tracking.remote import MlflowSubprocess\n"
        "from esper.messages import Metrics\n"
        "tracker = MlflowSubprocess(MlflowConfig(figures=False, model=False, system_s=0.0))\n"
        "tracker.open(msgspec.json.decode(sys.argv[1], type=RunInfo))\n"
        "tracker.record([Metrics(tick=1, values={'a': 2.0})])\n"
        "print('ready', flush=True)\n"
        "time.sleep(60)\n"
    )
    root = str(Path(__file__).resolve().parents[3])
    command = [sys.executable, "-c", script, msgspec.json.encode(info).decode()]
    trainer = subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": root})
    assert trainer.stdout.readline() == b"ready\n"
    trainer.send_signal(signal.SIGKILL)
    trainer.wait()
    trainer.stdout.close()
    run_id = json.loads((Path(info.folder) / "mlflow.json").read_text())["run"]
    deadline = time.monotonic() + 20
    while client.get_run(run_id).info.status == "RUNNING" and time.monotonic() < deadline:
        time.sleep(0.05)
    found = client.get_run(run_id)
    assert found.info.status == "KILLED" and found.data.metrics == {"a": 2.0}


def test_a_model_that_cannot_be_exported_is_an_error_that_says_what_to_do(tmp_path):
    class Odd(torch.nn.Module):
        def forward(self, x):
            return x if x.sum().item() > 0 else -x

    with pytest.raises(TrackerError, match=r"tracking\.model=false"):
        write_model(Odd(), torch.ones(2, 3), tmp_path)


def test_a_model_that_cannot_be_stored_is_raised_when_everything_else_was_kept(bus, info, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("esper.tracking.final_model.write_model", full)
    trackers = build_trackers(NoneConfig())
    trackers[0].wants_model = True
    runner = TrackerRunner(bus, info, trackers)
    runner.start()
    runner.log_model(Host(), torch.randn(2, 6))
    with pytest.raises(TrackerError, match=r"storing the final model failed.*No space"):
        runner.close("FAILED")
    assert (Path(info.folder) / "seeds.parquet").exists()


def test_a_tracker_that_wants_no_model_gets_none(bus, info):
    runner = TrackerRunner(bus, info, build_trackers(MlflowConfig(**LIGHT)))
    runner.log_model(Host(), torch.randn(2, 6))
    assert not (Path(info.folder) / "model").exists()
