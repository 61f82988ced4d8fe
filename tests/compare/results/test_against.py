"""Arms that are compared with another one than the reference, and comparisons whose sweep was stopped by its time limit."""

from __future__ import annotations

import dataclasses

import pytest

from esper.compare.results.analysis import analyse
from esper.compare.results.plan import Plan, parse_plan
from esper.compare.results.runs import Run
from esper.compare.results.tables import verdict_cells
from esper.errors import UserError

ARMS: dict[str, dict[str, object]] = {"deep": {"a": 1}, "deep_75": {"a": 2}, "grown": {"a": 3}}
VALUES = {"deep": 0.9, "deep_75": 0.5, "grown": 0.7}
PLAN = Plan("accuracy", "max", 0.01, 0.05, 0.8, 0.0, "deep", ARMS, tuple(range(8)), against={"grown": "deep_75"})


def runs(seeds: range = range(8), blocks: tuple[str, ...] = ("",), arms: tuple[str, ...] = tuple(ARMS)) -> list[Run]:
    noise = {"deep": 0, "deep_75": 1, "grown": 3}
    return [Run(arm, s, VALUES[arm] + 0.001 * (s * noise[arm] % 5), block=b) for b in blocks for arm in arms for s in seeds]


def test_an_arm_is_compared_with_the_one_that_the_plan_names() -> None:
    found = analyse(runs(), PLAN)
    assert [(row.arm, row.reference, row.verdict) for row in found.verdicts] == [
        ("deep_75", "deep", "A better"),
        ("grown", "deep_75", "B better"),
    ]
    assert found.verdicts[1].difference == pytest.approx(0.2, abs=0.01)
    assert "grown is better than deep_75" in found.verdicts[1].sentence
    cells = verdict_cells(found)
    assert [row[:2] for row in cells.rows] == [["deep_75", "deep"], ["grown", "deep_75"]] and cells.headings[1] == "against"
    assert "grown against deep_75" in PLAN.statement()[0]


def test_the_other_arm_is_part_of_the_plan() -> None:
    assert parse_plan(PLAN.text()) == PLAN
    moved = dataclasses.replace(PLAN, against={})
    assert analyse(runs(), moved, PLAN).exploratory
    assert "against" not in verdict_cells(analyse(runs(), moved)).headings


@pytest.mark.parametrize("against", [{"grown": "nothing"}, {"nothing": "grown"}, {"deep": "grown"}, {"grown": "grown"}])
def test_an_arm_that_is_not_there_cannot_be_named(against: dict[str, str]) -> None:
    with pytest.raises(UserError, match=r"compare.against=.* is not accepted: give two arms of this sweep, the first not the reference"):
        dataclasses.replace(PLAN, against=against)


def test_what_the_time_limit_left_out_has_no_verdict_and_takes_none_from_the_others() -> None:
    plan = dataclasses.replace(PLAN, blocks=("short", "long"))
    some = [*runs(blocks=("short",)), *runs(range(2), ("long",), ("deep", "deep_75"))]
    with pytest.raises(UserError, match="share no seed in block long"):
        analyse(some, plan)
    found = analyse(some, plan, partial=True)
    assert [(row.arm, row.block, row.pairs) for row in found.verdicts] == [
        ("deep_75", "short", 8),
        ("grown", "short", 8),
        ("deep_75", "long", 2),
        ("deep_75", "pooled", 2),
    ]
    assert any("Seeds [0, 1] of grown or deep_75 have no partner in long" in line for line in found.notes)
