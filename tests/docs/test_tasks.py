"""The commands and the program about tables in docs/tasks.md are run as they are written, on a real table."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from tests.here import here

pytestmark = pytest.mark.usefixtures("whole_runs")
PAGE = (Path(__file__).resolve().parents[2] / "docs" / "tasks.md").read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"^```\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL) for line in block.splitlines()]
(PYTHON,) = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
SHORT = ("trainer.steps=30", "trainer.control=false", "tracking=csv", "tracking.figures=false")


def test_a_table_is_learnt_and_its_rows_are_predicted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vega_datasets import data

    monkeypatch.chdir(tmp_path)
    weather = data.seattle_weather().assign(station=1, comment="dry", price=lambda frame: frame["temp_max"])
    weather.to_csv("data.csv", index=False)
    weather.to_parquet("data.parquet")
    found = {}
    for command in COMMANDS:
        done = here(*shlex.split(command)[1:], *SHORT, f"hydra.run.dir={tmp_path}/{len(found)}")
        assert done.returncode == 0, done.stderr
        assert here("export", f"run={tmp_path}/{len(found)}", f"to={tmp_path}/out", "format=safetensors").returncode == 0
        names: dict[str, object] = {}
        exec(compile(PYTHON, "docs/tasks.md", "exec"), names)
        found[command] = names["predictions"]
    price, kind = found.values()
    assert price.name == "price" and abs(float(price.mean()) - float(weather["price"].mean())) < 5  # type: ignore[attr-defined]
    assert set(kind) <= set(weather["weather"]) and len(kind) == len(weather)  # type: ignore[call-overload, arg-type]
