"""Configs of short runs, and one run that has ended."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from esper.checkpoint import disk
from esper.cli.compose import compose
from esper.config import RootConfig
from esper.report.summary_file import read_summary
from esper.running.run import run

SHORT = (
    "trainer.steps=80",
    "trainer.batch_size=32",
    "trainer.control=false",
    "trainer.checkpoint_every=5%",
    "trainer.checkpoint_keep=50",
    "trainer.validate_every=20%",
    "telemetry.every=5",
    "tracking=csv",
    "tracking.figures=false",
    "lifecycle.judge_every=5%",
    "controller=random",
    "controller.earliest=5%",
    "controller.latest=40%",
)
Configure = Callable[..., RootConfig]


@pytest.fixture(scope="session")
def configure(whole_runs: None) -> Configure:
    """A short run's config with further overrides; what of it another option of the same group has no key for is left out."""

    def composed(*words: str) -> RootConfig:
        given = {word.partition("=")[0] for word in words}
        return compose([word for word in SHORT if word.partition("=")[0].partition(".")[0] not in given] + list(words))

    return composed


@pytest.fixture(scope="session")
def finished(configure: Configure, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nobody disturbed."""
    output = tmp_path_factory.mktemp("finished")
    run(configure(f"output={output}"), output / "day" / "run", quiet=True)
    return output / "day" / "run"


def copied(finished: Path, tmp_path: Path, until: int | None = None) -> Path:
    """A run's folder as if it had died after ``until`` steps' checkpoint."""
    folder = tmp_path / "day" / "run"
    shutil.copytree(finished, folder)
    (folder / "config.yaml").write_text((folder / "config.yaml").read_text().replace(str(finished.parents[1]), str(tmp_path)))
    if until is not None:
        disk.forget_after(folder / disk.FOLDER, until)
        (folder / "run.lock").write_text(json.dumps({"config_hash": read_summary(folder)["config_hash"]}))
    return folder
