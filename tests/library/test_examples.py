"""The examples of the documentation run as they stand, and are as short as the pages say."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from growing import batch, build, sample_loss, short
from test_own_loop import JUDGE, train

from esper import attach, load_model
from esper.bus.trainer.bus_port import BusPort
from esper.lifecycle import Stage
from esper.telemetry_columns import COLUMNS

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.usefixtures("processes")
def test_the_own_loop_example_runs_and_grows() -> None:
    told = subprocess.run([sys.executable, str(DOCS / "examples" / "own_loop.py")], capture_output=True, text=True, check=True, timeout=120)
    germinated = re.search(r"germinated (\d+), kept (\d+)", told.stdout)
    assert germinated is not None and int(germinated.group(1)) > 0


def test_the_readmes_loop_runs_as_it_stands_and_misses_no_telemetry(monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", (DOCS.parent / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    told: list[torch.Tensor] = []
    telemetry = BusPort.telemetry

    def kept(self: BusPort, tick: int, site: str, rows: torch.Tensor) -> None:
        told.append(rows.clone())
        telemetry(self, tick, site, rows)

    monkeypatch.setattr(BusPort, "telemetry", kept)
    model = build("mlp")
    given: dict[str, Any] = {"model": model, "optimizer": torch.optim.AdamW(model.parameters(), 0.01), "loss": sample_loss}
    given |= {"judge_batches": JUDGE, "batches": [batch("mlp", number) for number in range(300)], "steps": 300}
    exec(block, given)
    assert given["grow"].steps == 300 and given["grow"].transitions.counts["germinated"] > 0
    assert type(given["plain"]) is type(model)
    columns = {name: torch.cat(told)[:, number] for number, name in enumerate(COLUMNS)}
    learning = (columns["stage"] == Stage.GRAFTING) | (columns["stage"] == Stage.FINE_TUNING)
    assert learning.any() and columns["grad_ratio"][learning].isfinite().all()


@pytest.fixture
def mine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module of ``my_pkg`` by name."""
    monkeypatch.syspath_prepend(str(DOCS / "examples"))
    return lambda name: importlib.import_module(f"my_pkg.{name}")


def test_own_blueprint_strategy_and_controller_work_in_a_loop_of_ones_own(mine: Any, tmp_path: Path) -> None:
    model = build("mlp")
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    parts = {
        "blueprint": mine("branches").Sine(hidden=4),
        "grafting": mine("ramps").Calm(),
        "controller": mine("gardener").Gardener(every=2, most=1),
    }
    grow = attach(model, loss=sample_loss, optimizer=optimizer, judge=JUDGE, total_steps=100, lifecycle=short(), **parts)
    train(model, grow, optimizer, 14)
    branch = grow.registry.branches[0]
    assert (branch.blueprint, branch.strategy) == ("sine", "custom")
    assert grow.registry.branches.alpha[0] > 0
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(grow.export().eval()(JUDGE[0][0]), model(JUDGE[0][0]))
        grow.save(tmp_path)
        loaded = load_model(tmp_path, build("mlp"), blueprints=[mine("branches").Sine])
        assert torch.equal(loaded(JUDGE[0][0]), grow.export().eval()(JUDGE[0][0]))


def test_own_data_takes_at_most_25_lines() -> None:
    assert len((DOCS / "examples" / "my_pkg" / "data.py").read_text(encoding="utf-8").splitlines()) <= 25


@pytest.mark.parametrize("page", sorted(path.name for path in DOCS.glob("own-*.md")))
def test_every_page_is_one_page_and_links_to_files_that_are_there(page: str) -> None:
    text = (DOCS / page).read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 60
    for link in re.findall(r"\]\(([^)]+)\)", text):
        page_of_link, _, heading = link.partition("#")
        assert (DOCS / page_of_link).is_file(), link
        headings = (DOCS / page_of_link).read_text(encoding="utf-8").lower().replace(" ", "-") if heading else ""
        assert f"#-{heading}" in headings or not heading, link
