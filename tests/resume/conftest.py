"""Configs of short runs, and one run that has ended."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from esper.cli.compose import compose
from esper.config import RootConfig
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
def configure() -> Configure:
    """A short run's config with further overrides."""
    return lambda *words: compose([word for word in SHORT if "tracking=none" not in words or "tracking." not in word] + list(words))


@pytest.fixture(scope="session")
def finished(configure: Configure, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nobody disturbed."""
    output = tmp_path_factory.mktemp("finished")
    run(configure(f"output={output}"), output / "day" / "run", quiet=True)
    return output / "day" / "run"
