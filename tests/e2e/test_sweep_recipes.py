"""The sweeps among the recipes of the README and of ``esper --help``, as they are written, with fewer steps and two seeds."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.test_recipes import SHORT, SWEEPS, written
from tests.here import here

pytestmark = pytest.mark.e2e

SEARCHES = [one for one in written() if "hydra/sweeper=optuna" in one]
AT_ONCE = [one for one in written() if one.startswith("torchrun")]
COMMANDS = [
    one for one in written() if any(part in one for part in SWEEPS) and "compare sweep=" not in one and one not in SEARCHES + AT_ONCE
]
AGAIN = [one for one in written() if "compare sweep=" in one]
SEEDS = 2
STEPS = ("trainer.steps=60", *(word for word in SHORT if not word.startswith(("trainer.steps", "trainer.control"))))
"""As many as a seed needs to germinate and grow in every study."""


def shortened(words: list[str]) -> list[str]:
    """Two seeds in place of as many as a verdict needs, a few steps, and no model kept."""
    kept = [word for word in words if not word.startswith("seed=")]
    return [*kept, f"seed=range(0,{SEEDS})", *STEPS]


def swept(words: list[str], tracking: str) -> dict[str, object]:
    """What the sweep of such a command left as its result."""
    done = here(*shortened(words), f"tracking={tracking}")
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    (sweep,) = Path("outputs/sweeps").glob("*/*/sweep.json")
    found: dict[str, object] = json.loads(sweep.read_text(encoding="utf-8"))
    assert len(list(sweep.parent.glob("*/summary.json"))) % SEEDS == 0
    return found | {"said": done.stdout}


def test_the_sweeps_are_found() -> None:
    assert len(COMMANDS) >= 4 and len(AGAIN) == len(SEARCHES) == 1 and len(AT_ONCE) == 2


@pytest.mark.parametrize("command", COMMANDS)
def test_a_sweep_ends_in_a_verdict(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = swept(shlex.split(command)[1:], "csv")
    alone = "controller.memory=" in command  # runs that learn from each other, of one arm
    assert ("One arm" if alone else "pairs") in str(found["said"])


@pytest.mark.parametrize("command", AT_ONCE)
def test_several_processes_train_one_run(command: str, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "torch.distributed.run", *shlex.split(command)[1:], *SHORT, "tracking=csv"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    (summary,) = tmp_path.glob("outputs/*/*/summary.json")
    assert json.loads(summary.read_text(encoding="utf-8"))["status"] == "FINISHED"


@pytest.mark.parametrize("command", SEARCHES)
def test_a_search_ends_with_its_best_trial(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = swept([*shlex.split(command)[1:], "hydra.sweeper.n_trials=2"], "csv")
    assert "2 trials: 2 finished" in str(found["said"])


@pytest.mark.parametrize("command", AGAIN)
def test_a_finished_sweep_is_judged_again(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = swept(["-m", "grafting=linear,drift"], "mlflow")
    done = here(*shlex.split(command.replace("<id>", str(found["id"])))[1:])
    assert done.returncode == 0 and "pairs" in done.stdout, done.stderr
