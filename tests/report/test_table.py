"""The report at the end: every branch, the comparison with the host alone, and loud words when nothing grew."""

from __future__ import annotations

import io
import math

import pytest
from rich.console import Console

from esper.report.end_of_run import print_report
from esper.report.number_format import count, duration, short

PATH = [["GERMINATED", 60], ["TRAINING", 110], ["FINE_TUNING", 300], ["FOSSILIZED", 350]]


def shown(summary: dict, ui: str = "") -> str:
    out = io.StringIO()
    print_report(summary, ui, Console(file=out, width=200))
    return out.getvalue()


def grown(**changes) -> dict:
    branch = {"site": "layers[0]", "seed": 1, "branch": 0, "blueprint": "mlp", "strategy": "linear", "path": PATH,
              "gain": 0.0312, "gain_bound": 0.0201, "parameters": 1234}  # fmt: skip
    block = {"site": "layers[1]", "seed": -1, "branch": 7, "blueprint": "block", "strategy": "drift", "path": PATH[:2],
             "gain": math.nan, "gain_bound": None, "parameters": 123456}  # fmt: skip
    return {
        "status": "FINISHED", "branches": [branch, block], "output": "outputs/run-1", "macs": 123_456_789,
        "seeds": {"germinated": 2, "fossilized": 1, "culled": 1, "cancelled": 0, "rolled_back": 0},
        "metrics": {"final": {"test/accuracy": 0.9123, "validation/accuracy": 0.9}, "best": {}},
        "control": {"same_steps": {"test/accuracy": 0.86}, "same_macs": None},
        "parameters": {"before": 650, "after": 1884}, "seconds": {"total": 41.2, "shadow": 3.0, "judge": 2.0},
        "gates": {"readiness": {"closest": -0.01, "threshold": 0.0, "passed": 0, "asked": 12}},
        "refusals": {"seed 3 of 'layers[0]' is TRAINING": 4},
    } | changes  # fmt: skip


def test_every_branch_has_a_row_with_its_path_gain_and_bound():
    text = shown(grown())
    assert "germinated 60 → training 110 → fine tuning 300 → fossilized 350" in text
    assert "0.0312 (≥ 0.0201)" in text
    assert "layers[0]" in text and "block 7" in text and "123 K" in text


def test_a_branch_that_was_to_replace_another_says_which():
    summary = grown()
    summary["branches"][0] |= {"replaces": 3}
    assert ", for branch 3" in shown(summary) and ", for branch" not in shown(grown())


def test_the_host_alone_stands_beside_the_result():
    text = shown(grown(), ui="mlflow ui --backend-store-uri sqlite:///x.db")
    assert "test/accuracy 0.9123" in text and "test/accuracy 0.86" in text and "not measured" in text
    assert "650 → 1884" in text and "123 M" in text and "12% of it on shadow" in text
    assert "mlflow ui --backend-store-uri sqlite:///x.db" in text and "outputs/run-1" in text
    assert "NOTHING" not in text


@pytest.mark.parametrize(
    ("seeds", "words"),
    [({"germinated": 0}, "NOTHING GERMINATED"), ({"germinated": 3, "culled": 3}, "NOTHING WAS KEPT: 3")],
)
def test_a_run_that_grew_nothing_says_so_with_gates_and_refusals(seeds: dict, words: str):
    text = shown(grown(seeds=seeds, branches=[]))
    assert words in text
    assert "readiness" in text and "-0.01" in text and "0 of 12" in text
    assert "refused 4 ×: seed 3 of 'layers[0]' is TRAINING" in text


def test_branches_that_are_blended_at_the_end_are_no_loss():
    branches = [{"path": [], "stage": "GRAFTING"}, {"path": [], "stage": "CULLED"}]
    text = shown(grown(seeds={"germinated": 2, "culled": 1}, branches=branches))
    assert "NOTHING IS DECIDED: 1 of 2 germinated are blended at the end and part of the model" in text
    assert "NOTHING WAS KEPT" not in text


def test_a_run_that_kept_nothing_says_why_its_host_is_not_the_host_alone():
    blended = [["GERMINATED", 60], ["TRAINING", 61], ["GRAFTING", 90], ["CULLED", 140], ["DORMANT", 160]]
    seeds = {"germinated": 2, "culled": 2}
    text = shown(grown(seeds=seeds, branches=[{"path": blended}, {"path": [*blended[:2], ["CULLED", 70]]}]))
    assert "still differs from the host alone: one branch was blended in between ticks 90 and 140" in text
    text = shown(grown(seeds=seeds, branches=[{"path": [*blended[:2], ["CULLED", 70]]}]))
    assert "No branch was ever blended in, so this host learned as the host alone does." in text


def test_a_run_that_asked_nothing_says_that_too():
    text = shown({"seeds": {}})
    assert "No gate was ever asked." in text and "No command was refused." in text


def test_numbers_read_well():
    assert [count(n) for n in (0, 9999, 12_345, 999_999, 1_234_567, 5e30, None)] == [
        "0",
        "9999",
        "12.3 K",
        "1 M",
        "1.23 M",
        "5e+12 E",
        "–",
    ]
    assert [duration(s) for s in (4.6, 75, 3725, math.inf, None)] == ["0:05", "1:15", "1:02:05", "–", "–"]
    assert [short(x) for x in (0.123456, math.nan, None)] == ["0.1235", "–", "–"]
