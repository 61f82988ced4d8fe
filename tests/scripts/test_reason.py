"""The study of reasoning compares nets at equal loss, by the plan that was registered before its first run."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml


@pytest.fixture
def report(checkout: Path) -> Iterator[ModuleType]:
    """The study's program as a module; what it imports from beside itself is forgotten afterwards."""
    path, known = list(sys.path), set(sys.modules)
    spec = importlib.util.spec_from_file_location("study_reason", checkout / "experiments" / "reason" / "report.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path[:] = path
        for name in sys.modules.keys() - known:
            if name in ("study_runs", "write_up"):
                del sys.modules[name]


def arms(report: ModuleType, gain: float, seeds: int = 16) -> dict[str, dict[int, dict[str, Any]]]:
    """Nets from scratch that solve 0.1 more for every 0.05 nats less, and grown ones with ``gain`` beside that line."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for arm, loss in {report.FEWER: 1.0, report.ALL: 0.95, report.GROWN: 1.02, report.SMALL: 1.1}.items():
        for seed in range(seeds):
            at, own = loss + 0.001 * (seed % 3), 0.01 * (seed % 4)
            solved = 0.5 + own - 2.0 * (at - 1.0) + (gain + 0.001 * (seed % 5) if arm == report.GROWN else 0.0)
            row = {f"test/{kind}": solved for kind in report.KINDS} | {"test/text_loss": at, "test/loss": at}
            found.setdefault(arm, {})[seed] = row
    return found


@pytest.mark.parametrize(("gain", "verdict"), [(0.06, "B better"), (-0.002, "equivalent")])
def test_a_grown_net_is_compared_with_the_line_through_the_nets_from_scratch(report: ModuleType, gain: float, verdict: str) -> None:
    made = arms(report, gain)
    assert report.slope(made, "adding", "text_loss") == pytest.approx(-2.0)
    result = report.judged(report.matched(made, "text_loss"))
    assert {row.block for row in result.comparison.verdicts} == {*report.KINDS, "pooled"}
    assert {row.verdict for row in result.comparison.verdicts} == {verdict}
    assert all(row.difference == pytest.approx(gain + 0.0019, abs=1e-4) for row in result.comparison.verdicts)
    assert not result.comparison.exploratory  # all that was planned is there, and nothing else


def test_pairs_that_there_was_no_time_for_make_it_exploratory(report: ModuleType) -> None:
    result = report.judged(report.matched(arms(report, 0.06, seeds=9), "text_loss"))
    assert result.comparison.exploratory == ["9 of 16 planned pairs are there"]
    text = report.findings(arms(report, 0.06, seeds=9), {"text_loss": result, "loss": result})
    assert "Exploratory: 9 of 16 planned pairs are there." in text and "| all kinds | +0.06" in text


def test_the_sweep_has_the_pairs_of_the_plan(checkout: Path) -> None:
    sweep = yaml.safe_load((checkout / "conf" / "experiment" / "reason.yaml").read_text())["hydra"]["sweeper"]["params"]
    plan = yaml.safe_load((checkout / "experiments" / "reason" / "matched_plan.json").read_text())["plan"]
    assert sweep["seed"] == f"range(0,{len(plan['seeds'])})" and plan["seeds"] == list(range(16))
