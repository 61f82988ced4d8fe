"""The description of an MLflow run, and the look at its store before training."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from esper.errors import UserError
from esper.tracking.config import MlflowConfig
from esper.tracking.mlflow_store import check_store
from esper.tracking.run_page import final_values, page_description

BRANCH = {"site": "fc1", "seed": 0, "blueprint": "mlp", "strategy": "linear", "parameters": 163}
SUMMARY = {
    "status": "FINISHED",
    "primary": "validation/accuracy",
    "steps": 2000,
    "metrics": {"final": {"test/accuracy": 0.9529, "validation/accuracy": 0.9}},
    "control": {"same_steps": {"test/accuracy": 0.89, "validation/accuracy": 0.8}, "same_macs": {"test/accuracy": 0.87}},
    "seeds": {"germinated": 2, "fossilized": 1, "culled": 1, "cancelled": 0, "rolled_back": 0},
    "parameters": {"before": 502, "after": 665},
    "branches": [
        BRANCH | {"path": [["GERMINATED", 1], ["FOSSILIZED", 9]], "gain": 0.34, "gain_bound": 0.1},
        BRANCH | {"seed": -1, "path": [["GERMINATED", 1], ["CULLED", 9], ["DORMANT", 12]], "gain": None},
    ],
}


def test_whether_growing_paid_stands_first():
    first, second, table = page_description(SUMMARY).split("\n\n")
    assert first == "**test/accuracy 0.9529**; the host alone: 0.89 at the same steps, 0.87 at the same MACs."
    assert second == "2 branches germinated (1 fossilized, 1 culled); parameters 502 → 665."
    assert table.splitlines()[2:] == [
        "| fc1 | 0 | mlp | linear | fossilized | 0.34 (≥ 0.1) | 163 |",
        "| fc1 | block | mlp | linear | culled | – | 163 |",
    ]


def test_what_did_not_get_there_says_so():
    assert page_description({}) == "The run ended without a summary."
    killed = {"status": "KILLED", "steps": 30, "primary": "validation/loss", "seeds": {"germinated": 0}}
    assert page_description(killed).startswith("Killed after 30 steps, before the final test.")
    assert "**Nothing germinated:**" in page_description(killed)


def test_the_host_alone_stands_beside_the_run_in_the_metrics():
    values = dict(final_values(SUMMARY))
    assert values["final/host_alone/accuracy_same_steps"] == 0.89
    assert values["final/host_alone/accuracy_same_macs"] == 0.87
    assert not [name for name in values if "host_alone" in name and "validation" in name]


def test_a_server_that_listens_passes_and_one_that_does_not_is_refused(tmp_path: Path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        uri = f"http://127.0.0.1:{server.getsockname()[1]}"
        check_store(MlflowConfig(uri=uri), str(tmp_path))
    with pytest.raises(UserError, match=r"does not answer \(connection refused\); start the server \(mlflow server\), or"):
        check_store(MlflowConfig(uri=uri), str(tmp_path))
    with pytest.raises(UserError, match="does not answer"):
        check_store(MlflowConfig(uri="http://127.0.0.1:99999999"), str(tmp_path))
    with pytest.raises(UserError, match=r"tracking.uri=foo://x is of no kind that MLflow knows; give sqlite:///"):
        check_store(MlflowConfig(uri="foo://x"), str(tmp_path))
    check_store(MlflowConfig(uri="postgresql+psycopg2://user@somewhere/store"), str(tmp_path))


def test_a_store_may_be_new_or_empty_but_no_other_file(tmp_path: Path):
    check_store(MlflowConfig(), str(tmp_path))
    (tmp_path / "mlflow.db").touch()
    check_store(MlflowConfig(), str(tmp_path))
    (tmp_path / "mlflow.db").write_text("a letter to a friend, and not a database")
    with pytest.raises(UserError, match="damaged or no SQLite database"):
        check_store(MlflowConfig(), str(tmp_path))


def test_a_store_that_cannot_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "mlflow.db").touch()
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everything
    with pytest.raises(UserError, match="cannot be written; get the right to"):
        check_store(MlflowConfig(), str(tmp_path))
