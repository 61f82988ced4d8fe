"""The run that MLflow keeps, in a real sqlite store: names, values, aggregates and files."""

from __future__ import annotations

import math
import time
from pathlib import Path

import msgspec
import numpy as np
import pytest
from stored_runs import LIGHT, history, tracked

from esper.compare.sweep.sweep import set_aside
from esper.messages import Alert, Metrics, RunStarted, Telemetry
from esper.tracking import DatasetInfo, MlflowConfig
from esper.tracking.mlflow_run import MlflowRun
from esper.tracking.parquet_files import ParquetFiles
from esper.tracking.run_page import final_values

pytestmark = pytest.mark.usefixtures("heavy_libraries")


def test_a_run_carries_name_params_tags_dataset_and_config(client, info):
    run = tracked(info, [])
    found = client.get_run(run.run_id)
    assert found.info.run_name == "digits-mlp seed=0 linear" and found.info.status == "FINISHED"
    assert found.data.params == {"trainer.steps": "100", "model": "mlp"}
    assert {"config": "abc", "seed": "0", "arm": "grow"}.items() <= found.data.tags.items()
    data = found.inputs.dataset_inputs[0].dataset
    assert data.name == "digits" and data.digest == "d" * 36 and "d" * 64 in data.source
    assert "config.yaml" in [item.path for item in client.list_artifacts(run.run_id)]


def test_of_two_runs_that_begin_at_once_both_keep_their_data_set(client, make_info, outputs):
    """The other run adds the entry they share after MLflow looked for it for this one, and before it adds it."""
    from sqlalchemy import event
    from sqlalchemy.orm import Session

    data = DatasetInfo(name="shared", digest="e" * 64, description="", sizes={})
    infos = [make_info(name, outputs / name, dataset=data) for name in ("one", "other")]
    for info in infos:
        Path(info.folder).mkdir()
    runs: list[MlflowRun] = []

    def meanwhile(session: Session, *_: object) -> None:
        if any(type(entry).__name__ == "SqlDataset" for entry in session.new):
            event.remove(Session, "before_flush", meanwhile)
            runs.append(tracked(infos[1], []))

    event.listen(Session, "before_flush", meanwhile)
    runs.append(tracked(infos[0], []))
    assert len(runs) == 2
    for run in runs:
        assert [found.dataset.name for found in client.get_run(run.run_id).inputs.dataset_inputs] == ["shared"]


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


def test_a_failing_end_marks_the_run_failed(client, info, monkeypatch):
    run = MlflowRun(MlflowConfig(**LIGHT))
    run.open(info)
    monkeypatch.setattr(run, "_log_files", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run.close("FINISHED", {})
    assert client.get_run(run.run_id).info.status == "FAILED"


def test_telemetry_of_another_order_of_columns_is_read_by_name(client, info):
    rows = np.array([[[0.25, 3.0], [0.75, 3.0]]], np.float32)
    messages = [
        RunStarted(tick=0, total_ticks=1, sites=[]),
        Telemetry(site="s", ticks=[1], seeds=2, columns=["alpha", "stage"], data=rows.tobytes()),
    ]
    run = tracked(info, messages)
    assert client.get_run(run.run_id).data.metrics == {"sites/s/seeds_grafting": 2.0, "sites/s/alpha_grafting": 0.5}
