"""The commands of docs/auto.md are run as they are written, with a small budget, on the real data that they name."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from tests.here import here

pytestmark = pytest.mark.usefixtures("whole_runs")
PAGE = (Path(__file__).resolve().parents[2] / "docs" / "auto.md").read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"^```\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL) for line in block.splitlines()]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_size_is_found_as_the_page_says(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vega_datasets import data

    monkeypatch.chdir(tmp_path)
    data.seattle_weather().to_csv("data.csv", index=False)
    budget = "5e8macs" if "digits" in command else "4e7macs"
    done = here(*(word if not word.startswith("budget=") else f"budget={budget}" for word in shlex.split(command)[1:]))
    assert done.returncode == 0 and "It ended because" in done.stdout, done.stdout + done.stderr
    (folder,) = tmp_path.glob("outputs/auto/*/*")
    left = {path.name for path in folder.iterdir()}
    assert {name.rstrip("/") for name in re.findall(r"`([\w.]+(?:\.json|\.txt|\.png|/))`", PAGE)} - {"preprocessing.json"} <= left
    assert (folder / "model" / "preprocessing.json").exists() is ("task=table" in command)
