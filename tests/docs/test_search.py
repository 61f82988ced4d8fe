"""Every command of docs/search.md is run as it is written, with few trials and steps."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from tests.here import here

pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("processes")]
PAGE = (Path(__file__).resolve().parents[2] / "docs" / "search.md").read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"^```\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL) for line in block.splitlines()]
SHORT = ("trainer.steps=30", "trainer.validate_every=50%", "trainer.save=false", "tracking=csv", "hydra.sweeper.n_trials=2")


@pytest.mark.parametrize("command", [one for one in COMMANDS if "hydra/sweeper" in one])
def test_a_search_does_what_the_page_says(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = [word for word in shlex.split(command)[1:] if not word.startswith("hydra.sweeper.n_trials=")]
    done = here(*words, *SHORT)
    assert done.returncode == 0 and "2 trials: 2 finished." in done.stdout, done.stdout + done.stderr
    (folder,) = {path.parent for path in tmp_path.glob("outputs/sweeps/*/*/search.json")}
    found = {path.name for path in folder.iterdir() if path.is_file()} | {f"figures/{path.name}" for path in (folder / "figures").iterdir()}
    assert set(re.findall(r"`((?:figures/)?\w+\.(?:json|txt|csv|png|journal))`", PAGE)) <= found
