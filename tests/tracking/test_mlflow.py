"""MLflow runs in a real sqlite store: what a person finds there, and what happens when things go wrong."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from esper.compare.sweep.sweep import set_aside
from esper.errors import UserError
from esper.messages import Alert, Metrics, RunStarted, Telemetry
from esper.tracking import (
    MlflowConfig,
    NoneConfig,
    TrackerError,
    TrackerRunner,
    build_trackers,
    tracking_uri,
    ui_command,
)
from esper.tracking.final_model import write_model
from esper.tracking.mlflow_run import MlflowRun
from esper.tracking.mlflow_store import check_store, quiet_client
from esper.tracking.parquet_files import ParquetFiles
from esper.tracking.remote import MlflowSubprocess
from esper.tracking.run_page import final_values

pytestmark = pytest.mark.usefixtures("heavy_libraries")

ROOT = str(Path(__file__).resolve().parents[2])
LIGHT = {"figures": False, "model": False, "system_s": 0.0}


@pytest.fixture(scope="module")
def outputs(tmp_path_factory) -> Path:
    """One outputs folder, with one store, for all tests of this file."""
    return tmp_path_factory.mktemp("outputs")


@pytest.fixture(scope="module")
def client(outputs: Path):
    """A client of that store."""
    return quiet_client(tracking_uri(MlflowConfig(), str(outputs)))


@pytest.fixture
def info(request, make_info, outputs: Path):
    """A run of its own in the shared outputs folder."""
    folder = outputs / request.node.name.replace("[", "-").replace("]", "")
    folder.mkdir()
    return make_info(request.node.name, folder, name="digits-mlp seed=0 linear")


def tracked(info, messages, status: str = "FINISHED", summary=None, **options) -> MlflowRun:
    run = MlflowRun(MlflowConfig(**(LIGHT | options)))
    run.open(info)
    run.record(messages)
    run.close(status, summary or {})
    return run


def history(client, run: MlflowRun, name: str) -> list[tuple[int, int, float]]:
    return [(m.step, m.timestamp, m.value) for m in client.get_metric_history(run.run_id, name)]


def test_a_run_carries_name_params_tags_dataset_and_config(client, info):
    run = tracked(info, [])
    found = client.get_run(run.run_id)
    assert found.info.run_name == "digits-mlp seed=0 linear" and found.info.status == "FINISHED"
    assert found.data.params == {"trainer.steps": "100", "model": "mlp"}
    assert {"config": "abc", "seed": "0", "arm": "grow"}.items() <= found.data.tags.items()
    data = found.inputs.dataset_inputs[0].dataset
    assert data.name == "digits" and data.digest == "d" * 36 and "d" * 64 in data.source
    assert "config.yaml" in [item.path for item in client.list_artifacts(run.run_id)]


def test_timestamps_are_start_plus_tick_and_telling_twice_stores_once(client, info):
    messages = [Metrics(tick=tick, values={"train/loss": 1.0 / tick}) for tick in range(1, 2500)]
    run = tracked(info, messages + messages)
    values = history(client, run, "train/loss")
    assert values == [(t, info.started_ms + t, 1.0 / t) for t in range(1, 2500)]


def test_a_resumed_run_goes_on_in_the_same_mlflow_run(client, info, make_info):
    first = tracked(info, [Metrics(tick=t, values={"a": float(t)}) for t in range(1, 8)], status="KILLED")
    later = make_info(
        info.run,
        Path(info.folder),
        started_ms=info.started_ms + 10**6,
        changed={"trainer.steps": "200", "new": "1"},
    )
    again = tracked(later, [Metrics(tick=t, values={"a": float(t)}) for t in range(5, 11)])
    assert again.run_id == first.run_id
    assert [step for step, _, _ in history(client, again, "a")] == list(range(1, 11))
    found = client.get_run(again.run_id)
    assert found.info.status == "FINISHED" and len(found.inputs.dataset_inputs) == 1
    assert found.data.params == {"trainer.steps": "100", "new": "1", "model": "mlp"}


@pytest.mark.parametrize("name", ["killed", "it's killed", 'said "killed"'])
def test_a_process_killed_before_it_noted_its_run_leaves_no_second_one(client, make_info, outputs, name):
    folder = outputs / name
    folder.mkdir()
    first = MlflowRun(MlflowConfig(**LIGHT))
    first.open(make_info(name, folder))
    (folder / "mlflow.json").unlink()
    again = MlflowRun(MlflowConfig(**LIGHT))
    again.open(make_info(name, folder))
    assert again.run_id == first.run_id


@pytest.mark.parametrize("status", ["FAILED", "FINISHED", "KILLED"])
def test_an_attempt_that_was_set_aside_keeps_its_mlflow_run(client, make_info, outputs, status):
    folder = outputs / f"again [{status}]"
    folder.mkdir()
    first = tracked(make_info(status, folder), [Metrics(tick=1, values={"a": 1.0})], status=status)
    set_aside(folder)
    folder.mkdir()
    again = tracked(make_info(status, folder, changed={"trainer.steps": "200"}), [Metrics(tick=1, values={"a": 2.0})])
    assert again.run_id != first.run_id
    assert client.get_run(first.run_id).info.status == status
    assert [value for _, _, value in history(client, first, "a")] == [1.0]
    assert client.get_run(again.run_id).data.params["trainer.steps"] == "200"


def test_five_numbers_stand_in_the_first_section(client, info):
    told = [Metrics(tick=t, values={"validation/accuracy": t / 10, "params/total": 500.0, "train/loss": 1.0}) for t in (1, 2)]
    summary = {
        "primary": "validation/loss",
        "direction": "min",
        "metrics": {"final": {"test/loss": 0.5}},
        "control": {"same_steps": {"test/loss": 0.75}, "same_macs": {"test/loss": 0.25}},
    }
    run = tracked(msgspec.structs.replace(info, primary="validation/accuracy"), told, summary=summary)
    values = client.get_run(run.run_id).data.metrics
    first = {name: value for name, value in values.items() if name.startswith("0_main/")}
    assert first == {
        "0_main/validation_accuracy": 0.2,
        "0_main/parameters": 500.0,
        "0_main/test_loss": 0.5,
        "0_main/better_than_host_same_steps": 0.25,
        "0_main/better_than_host_same_macs": -0.25,
    }
    assert min(values) in first, "sections are sorted by name"
    assert len(history(client, run, "0_main/validation_accuracy")) == 2


def test_what_the_store_would_refuse_is_made_to_fit(client, make_info, outputs):
    folder = outputs / "long"
    folder.mkdir()
    deep = "/".join(["block"] * 60)
    branches = [{"site": f"layer{i}", "seed": i, "blueprint": "mlp", "strategy": "linear", "path": [["CULLED", 1]]} for i in range(200)]
    summary = {"primary": "validation/accuracy", "metrics": {"final": {"test/accuracy": 0.5}}, "branches": branches}
    info = make_info("long", folder, changed={"sites.match": "x" * 9000}, tags={"tags": "y" * 9000})
    values = {f"{deep}/a": 1.0, f"{deep}/b": 2.0, "a//b": 3.0, "../c": 4.0, "/d/": 5.0}
    run = tracked(info, [Metrics(tick=1, values=values)], summary=summary)
    found = client.get_run(run.run_id)
    assert len(found.data.params["sites.match"]) == 500 and found.data.tags["mlflow.note.content"].endswith("…")
    assert {"a/b", "_/c", "d"} <= found.data.metrics.keys()
    assert sorted(value for name, value in found.data.metrics.items() if name.startswith("block/")) == [1.0, 2.0]


def test_of_two_values_of_a_tick_the_last_is_sent(client, info):
    run = tracked(info, [Metrics(tick=1, values={"a": 3.0}), Metrics(tick=1, values={"a": 2.0})])
    assert [value for _, _, value in history(client, run, "a")] == [2.0]


# --- tried before training ------------------------------------------------------------------------------------------


def prepared(config: MlflowConfig, outputs: Path, folder: Path) -> None:
    check_store(config, str(outputs))
    MlflowRun(config).prepare(str(outputs), str(folder))


def test_a_deleted_experiment_is_refused_with_the_command_that_restores_it(client, outputs, tmp_path):
    experiment = client.create_experiment("thrown away")
    client.delete_experiment(experiment)
    with pytest.raises(UserError, match=rf"experiment 'thrown away' was deleted; restore it \(.*restore --experiment-id {experiment}\)"):
        prepared(MlflowConfig(experiment="thrown away"), outputs, tmp_path)
    client.restore_experiment(experiment)
    prepared(MlflowConfig(experiment="thrown away"), outputs, tmp_path)


def test_a_deleted_run_is_refused_when_it_is_to_be_continued(client, info, outputs):
    run = tracked(info, [])
    client.delete_run(run.run_id)
    with pytest.raises(UserError, match=rf"restore it \(.* mlflow runs restore --run-id {run.run_id}\), or remove .*mlflow.json"):
        prepared(MlflowConfig(), outputs, Path(info.folder))
    (Path(info.folder) / "mlflow.json").write_text(json.dumps({"uri": tracking_uri(MlflowConfig(), str(outputs)), "run": "gone"}))
    with pytest.raises(UserError, match=r"run gone is no longer in sqlite:.*; bring back the store, or remove"):
        prepared(MlflowConfig(), outputs, Path(info.folder))


DRIVERS = {
    "postgresql+psycopg2": ("psycopg2", "psycopg2-binary"),
    "postgresql+psycopg": ("psycopg", r"'psycopg\[binary\]'"),
    "mysql+mysqldb": ("MySQLdb", "mysqlclient"),
}


@pytest.mark.parametrize("scheme", DRIVERS)
def test_a_missing_driver_is_named(scheme, tmp_path, monkeypatch):
    module, package = DRIVERS[scheme]
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=rf"pip install {package}, or choose tracking=csv"):
        MlflowRun(MlflowConfig(uri=f"{scheme}://me@127.0.0.1:1/runs")).prepare(str(tmp_path), str(tmp_path))


@pytest.mark.parametrize("name", ["100%", "a%20b", "why?", "a#b c", "é'\""])
def test_the_store_lies_in_the_outputs_folder_whatever_that_is_called(name, tmp_path, make_info):
    outputs = tmp_path / name
    folder = outputs / "run"
    folder.mkdir(parents=True)
    (folder / "run.log").write_text("hello")
    run = tracked(make_info("run", folder, outputs=str(outputs)), [Metrics(tick=1, values={"a": 1.0})])
    assert (outputs / "mlflow.db").stat().st_size > 0 and [path.name for path in tmp_path.iterdir()] == [name]
    found = quiet_client(tracking_uri(MlflowConfig(), str(outputs)))
    assert found.get_run(run.run_id).data.metrics == {"a": 1.0}
    assert Path(found.download_artifacts(run.run_id, "run.log")).read_text() == "hello"
    assert (outputs / "mlflow-artifacts" / run.run_id).is_dir()
    check_store(MlflowConfig(), str(outputs))


def test_a_damaged_store_is_refused_before_anything_is_written(tmp_path):
    quiet_client(tracking_uri(MlflowConfig(), str(tmp_path)))
    store = tmp_path / "mlflow.db"
    whole = store.read_bytes()
    for broken in (whole[: len(whole) // 2], whole[:8192] + b"\xff" * 65536 + whole[8192 + 65536 :]):
        store.write_bytes(broken)
        with pytest.raises(UserError, match=r"mlflow\.db is damaged or no SQLite database; move it away"):
            prepared(MlflowConfig(), tmp_path, tmp_path)
        assert store.read_bytes() == broken


def test_a_new_store_is_made_without_waiting_for_the_disk_and_no_half_of_one_is_left(tmp_path, monkeypatch):
    from mlflow.store.db import utils as mlflow_tables

    uri = tracking_uri(MlflowConfig(), str(tmp_path))
    upgrade, waits = mlflow_tables._upgrade_db, []

    def level(engine):
        with engine.connect() as connection:
            return connection.exec_driver_sql("PRAGMA synchronous").scalar()

    def broken(engine):
        waits.append(level(engine))
        upgrade(engine)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(mlflow_tables, "_upgrade_db", broken)
        quiet_client(uri)
    (tmp_path / ".mlflow.db.0.new-journal").write_text("of one that was killed")
    assert waits == [0] and not (tmp_path / "mlflow.db").stat().st_size
    store = quiet_client(uri)._tracking_client.store
    assert level(store.engine) == 2, "what runs write is as safe as ever"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mlflow.db", "mlflow.db.lock"]


@pytest.mark.usefixtures("processes")
def test_a_store_of_another_version_is_refused_with_the_command_that_upgrades_it(tmp_path):
    quiet_client(tracking_uri(MlflowConfig(), str(tmp_path)))
    with contextlib.closing(sqlite3.connect(tmp_path / "mlflow.db")) as store:
        store.execute("UPDATE alembic_version SET version_num = '90e64c465722'")
        store.commit()
    script = (
        "import sys\nfrom esper.tracking.config import MlflowConfig\nfrom esper.tracking.mlflow_run import MlflowRun\n"
        "MlflowRun(MlflowConfig()).prepare(sys.argv[1], sys.argv[1])"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": ROOT})
    assert "made by another version of MLflow; copy it, then run mlflow db upgrade sqlite:///" in done.stderr


def test_a_run_that_cannot_begin_leaves_none_behind(client, info, monkeypatch):
    run = MlflowRun(MlflowConfig(**LIGHT))
    monkeypatch.setattr("mlflow.tracking.MlflowClient.log_dict", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run.open(info)
    assert client.get_run(run.run_id).info.lifecycle_stage == "deleted"
    assert not (Path(info.folder) / "mlflow.json").exists()


def test_values_that_are_not_finite_are_kept_as_nan_and_named(client, info):
    run = tracked(info, [Metrics(tick=3, values={"train/loss": math.inf}), Metrics(tick=4, values={"train/loss": math.nan})])
    assert [math.isnan(value) for _, _, value in history(client, run, "train/loss")] == [True, True]
    assert client.get_run(run.run_id).data.tags["not_finite"] == "train/loss at tick 3"


def test_aggregates_per_site_and_stage_follow_the_seeds(client, info, story):
    run = tracked(info, [message for _, message in story(100)])
    training = {step: value for step, _, value in history(client, run, "sites/layers.0/seeds_training")}
    assert max(training.values()) == 1.0 and training[100] == 0.0
    assert history(client, run, "sites/layers.0/alpha_grafting")[0][2] == 0.5
    assert history(client, run, "sites/layers_1_/gain_fossilized")[-1][2] == pytest.approx(0.03)
    dormant = history(client, run, "sites/layers_1_/seeds_dormant")
    assert dormant[0][2] == 4.0 and dormant[-1][2] == 3.0


def test_health_and_parity_are_told_per_site_and_stage_too(client, info, story):
    run = tracked(info, [message for _, message in story(100)])
    names = {name.removeprefix("sites/layers.0/") for name in client.get_run(run.run_id).data.metrics if name.startswith("sites/layers.0/")}
    dormant = {step: value for step, _, value in history(client, run, "sites/layers.0/near_zero_dormant")}
    assert dormant[1] == pytest.approx(1.5 / 4) and dormant[15] == pytest.approx(1.25 / 3), "of seeds 0, 2 and 3 when 1 has gone"
    assert history(client, run, "sites/layers.0/variance_training")[0][2] == 2.0
    assert history(client, run, "sites/layers.0/branch_rms_ratio_grafting")[0][2] == pytest.approx(0.2)
    assert {value for _, _, value in history(client, run, "sites/layers.0/grad_ratio_training")} == {5.0}
    assert "grad_ratio_fossilized" not in names, "nothing there is finite"
    assert not {"branch_rms_ratio_training", "near_zero_germinated", "variance_culled", "grad_ratio_dormant"} & names
    assert len(names) < 50


def test_aggregates_are_thinned_to_the_points_asked_for(client, info, story):
    run = tracked(info, [message for _, message in story(200)], points=20)
    assert [step for step, _, _ in history(client, run, "sites/layers.0/seeds_dormant")] == [1, *range(10, 201, 10)]
    assert len(history(client, run, "train/loss")) == 200


def test_final_and_best_values_counts_and_alerts_are_logged(client, info):
    alerts = [Alert(tick=t, level="warning", code="x", text="y") for t in (2, 5)]
    summary = {
        "metrics": {"final": {"test/accuracy": 0.9, "gone": None}, "best": {"validation/accuracy": 0.93}},
        "seeds": {"germinated": 3},
    }
    run = tracked(info, alerts, summary=summary)
    values = client.get_run(run.run_id).data.metrics
    assert values == {
        "final/test/accuracy": 0.9,
        "best/validation/accuracy": 0.93,
        "final/seeds/germinated": 3.0,
        "alerts/warning": 2.0,
    }
    assert final_values({}) == []


def test_files_of_the_run_become_artifacts(client, info, story):
    folder = Path(info.folder)
    messages = [message for _, message in story(50)]
    files = ParquetFiles()
    files.open(info)
    files.record(messages)
    files.close("FINISHED", {})
    (folder / "summary.json").write_text("{}")
    (folder / "run.log").write_text("hello")
    run = tracked(info, messages, figures=True)
    names = {item.path for item in client.list_artifacts(run.run_id)}
    assert {"seeds.parquet", "transitions.parquet", "summary.json", "run.log", "config.yaml", "figures"} <= names
    assert {item.path for item in client.list_artifacts(run.run_id, "figures")} == {
        f"figures/{name}.png" for name in ("stages", "learning", "gates")
    }


def test_a_child_of_a_sweep_knows_its_parent(client, make_info, info):
    parent = tracked(info, [])
    folder = Path(info.folder) / "child"
    folder.mkdir()
    child = tracked(make_info("child", folder, outputs=info.outputs, parent=parent.run_id), [])
    assert client.get_run(child.run_id).data.tags["mlflow.parentRunId"] == parent.run_id


def test_system_metrics_are_mlflows_own(client, info):
    run = MlflowRun(MlflowConfig(**(LIGHT | {"system_s": 0.2})))
    run.open(info)
    time.sleep(1.5)
    run.close("FINISHED", {})
    assert "system/cpu_utilization_percentage" in client.get_run(run.run_id).data.metrics


def test_a_folder_as_store_is_refused_with_what_to_give(info):
    with pytest.raises(UserError, match="sqlite:///"):
        MlflowRun(MlflowConfig(uri="file:///tmp/x")).open(info)


def test_a_failing_end_marks_the_run_failed(client, info, monkeypatch):
    run = MlflowRun(MlflowConfig(**LIGHT))
    run.open(info)
    monkeypatch.setattr(run, "_log_files", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run.close("FINISHED", {})
    assert client.get_run(run.run_id).info.status == "FAILED"


def test_the_command_that_opens_the_interface():
    assert ui_command("sqlite:////a b/mlflow.db") == "mlflow ui --backend-store-uri 'sqlite:////a b/mlflow.db'"
    assert ui_command("http://host:5000") == "http://host:5000"
    assert tracking_uri(MlflowConfig(), "outputs") == f"sqlite:///{Path.cwd()}/outputs/mlflow.db"
    assert tracking_uri(MlflowConfig(uri="http://h"), "outputs") == "http://h"


# --- in a process of its own ----------------------------------------------------------------------------------------


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
    root = str(Path(__file__).resolve().parents[2])
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


def test_telemetry_of_another_order_of_columns_is_read_by_name(client, info):
    rows = np.array([[[0.25, 3.0], [0.75, 3.0]]], np.float32)
    messages = [
        RunStarted(tick=0, total_ticks=1, sites=[]),
        Telemetry(site="s", ticks=[1], seeds=2, columns=["alpha", "stage"], data=rows.tobytes()),
    ]
    run = tracked(info, messages)
    assert client.get_run(run.run_id).data.metrics == {"sites/s/seeds_grafting": 2.0, "sites/s/alpha_grafting": 0.5}
