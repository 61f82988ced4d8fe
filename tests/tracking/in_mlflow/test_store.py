"""The store of MLflow: tried before training, and refused in words where it cannot take the run."""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from stored_runs import tracked

from esper.errors import UserError
from esper.messages import Metrics
from esper.tracking import MlflowConfig, tracking_uri, ui_command
from esper.tracking.mlflow_run import MlflowRun
from esper.tracking.mlflow_store import check_store, quiet_client

pytestmark = pytest.mark.usefixtures("heavy_libraries")

ROOT = str(Path(__file__).resolve().parents[3])


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


def test_an_experiment_that_another_machine_makes_at_that_moment_is_taken(client, outputs, tmp_path):
    from sqlalchemy import event
    from sqlalchemy.orm import Session

    made: list[str] = []

    def meanwhile(session: Session, *_: object) -> None:
        if any(type(entry).__name__ == "SqlExperiment" for entry in session.new):
            event.remove(Session, "before_flush", meanwhile)
            made.append(client.create_experiment("shared"))  # without the lock that processes of one machine take

    event.listen(Session, "before_flush", meanwhile)
    prepared(MlflowConfig(experiment="shared"), outputs, tmp_path)
    assert made == [client.get_experiment_by_name("shared").experiment_id]


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


def test_a_folder_as_store_is_refused_with_what_to_give(info):
    with pytest.raises(UserError, match="sqlite:///"):
        MlflowRun(MlflowConfig(uri="file:///tmp/x")).open(info)


def test_the_command_that_opens_the_interface():
    assert ui_command("sqlite:////a b/mlflow.db") == "mlflow ui --backend-store-uri 'sqlite:////a b/mlflow.db'"
    assert ui_command("http://host:5000") == "http://host:5000"
    assert tracking_uri(MlflowConfig(), "outputs") == f"sqlite:///{Path.cwd()}/outputs/mlflow.db"
    assert tracking_uri(MlflowConfig(uri="http://h"), "outputs") == "http://h"
