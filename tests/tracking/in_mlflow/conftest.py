"""One real sqlite store a file of tests, and runs of their own in it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from esper.tracking import MlflowConfig, tracking_uri
from esper.tracking.mlflow_store import quiet_client

sys.path.insert(0, str(Path(__file__).resolve().parent))  # stored_runs.py


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
