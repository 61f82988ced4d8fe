"""The tutorials run as they stand: their Python in one piece a page, their commands as far as the checks before a run."""

from __future__ import annotations

import math
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from esper.cli.compose import check_jobs

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "tutorials"
PAGES = sorted(path.name for path in FOLDER.glob("*.md"))
WITH_CODE = [name for name in PAGES if "```python" in (FOLDER / name).read_text(encoding="utf-8")]
COMMAND = re.compile(r"^(?:ESPER_ALLOW=(\w+) )?esper (?!compare )(.+)$", re.MULTILINE)


def _grew(values: dict[str, Any]) -> None:
    """What every page with code ends with: something germinated, and the loss is a number."""
    assert values["grow"].transitions.counts["germinated"] > 0
    assert math.isfinite(values["loss"].detach())


@pytest.mark.parametrize("name", WITH_CODE)
@pytest.mark.usefixtures("heavy_libraries")
def test_the_code_of_a_tutorial_runs_from_top_to_bottom(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (FOLDER / name).read_text(encoding="utf-8"), re.DOTALL)
    values: dict[str, Any] = {"__name__": "tutorial"}
    exec("\n\n".join(blocks), values)
    _grew(values)


@pytest.mark.parametrize(("name", "environment", "words"), [
    (name, *found) for name in PAGES for found in COMMAND.findall((FOLDER / name).read_text(encoding="utf-8"))
])  # fmt: skip
def test_a_command_of_a_tutorial_is_accepted(
    name: str, environment: str, words: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if environment:
        monkeypatch.setenv("ESPER_ALLOW", environment)
        monkeypatch.syspath_prepend(str(FOLDER.parent / "examples"))
    given = [word for word in shlex.split(words) if word != "-m"]
    composed = check_jobs([*given, f"output={tmp_path}"], multirun="-m" in words.split())
    if environment:
        task = composed.config.task.build()
        assert min(len(task.train), len(task.judge), len(task.validation), len(task.test)) > 0
