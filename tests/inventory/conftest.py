"""An outputs folder with a real run and a real sweep in an MLflow store, made once."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SHORT = ("trainer.steps=40", "trainer.control=false", "trainer.validate_every=20%", "tracking.figures=false", "telemetry.every=5")
STORED = ("tracking.model=false", "tracking.system_s=0")


@pytest.fixture(scope="session")
def made(processes: None, whole_runs: None, tmp_path_factory: pytest.TempPathFactory, checkout: Path) -> Path:
    """``day/run`` with CSV files, and ``s``, a sweep of two arms and two seeds; their jobs are in folders ``s/0-…`` to ``s/3-…``."""
    output = tmp_path_factory.mktemp("made")
    environment = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1", "MLFLOW_DISABLE_TELEMETRY": "true"}

    def esper(*words: str) -> None:
        subprocess.run([sys.executable, "-m", "esper", *words, f"output={output}"], check=True, env=environment, capture_output=True)

    esper(*SHORT, "tracking=csv", "seed=7", f"hydra.run.dir={output}/day/run")
    arms = ("grafting=linear,drift", "seed=0,1", "compare.figures=false")
    esper("-m", *SHORT, *STORED, *arms, f"hydra.sweep.dir={output}/s")
    return output


@pytest.fixture
def outputs(made: Path, tmp_path: Path) -> Path:
    """A copy that a test may change, with jobs in ``s/0`` to ``s/3``. Its store still knows the folders of ``made``."""
    copy = Path(shutil.copytree(made, tmp_path / "outputs"))
    for job in copy.glob("s/*-*"):
        job.rename(job.with_name(job.name.partition("-")[0]))
    return copy
