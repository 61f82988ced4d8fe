"""docs/growing.md says what the committed tables of the studies say, and its recipes are settings that there are."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path
from statistics import fmean

import pytest

from esper.cli.compose import compose

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "growing.md").read_text(encoding="utf-8")
TEXT = " ".join(PAGE.split())
HOST = {"half_50": "half", "half_75": "half", "quarter_50": "quarter", "quarter_75": "quarter"}
EQUAL = {"half_50": "deep_75", "half_75": "deep_62", "quarter_50": "deep_62", "quarter_75": "deep_44"}
Rows = list[dict[str, str]]
Read = Callable[..., Rows]


@pytest.fixture
def rows(checkout: Path) -> Read:
    """The finished runs of a study's comparison, those of a cell where one is named."""

    def read(study: str, name: str = "runs.csv", **cell: str) -> Rows:
        with (checkout / "experiments" / study / name).open(newline="", encoding="utf-8") as file:
            found = [row for row in csv.DictReader(file) if row["kind"] == "compared" and row["status"] == "FINISHED"]
        return [row for row in found if all(row[key.replace("__", ".")] == value for key, value in cell.items())]

    return read


def values(rows: Rows, arm: str, key: str) -> dict[str, float]:
    """By seed."""
    return {row["seed"]: float(row[key]) for row in rows if row["arm"] == arm}


def behind(rows: Rows, arm: str, other: str, key: str = "test/loss") -> float:
    """By how much the arm's value is larger than the other's, the mean over the seeds that both have."""
    ours, theirs = values(rows, arm, key), values(rows, other, key)
    return fmean(ours[seed] - theirs[seed] for seed in ours.keys() & theirs.keys())


def share(rows: Rows, arm: str) -> float:
    """MACs over those of the final net from scratch with all steps."""
    return fmean(values(rows, arm, "macs").values()) / fmean(values(rows, "deep", "macs").values())


def test_the_frontier(rows: Read, checkout: Path) -> None:
    verdicts = json.loads((checkout / "experiments" / "growth_frontier" / "comparison.json").read_text())["verdicts"]
    p = {(row["block"], row["arm"]): row["p_holm"] for row in verdicts}
    fresh, again = (rows("growth_frontier", task__train_tokens=tokens) for tokens in ("0", "1000000"))
    assert f"({behind(fresh, 'half_50', 'deep_75'):.3f} nats behind, p = {p['0', 'deep_75']:.2f})" in TEXT
    assert f"that net is {behind(fresh, 'half_50', 'deep'):.3f} nats better (p = {p['0', 'deep']:.3f})" in TEXT
    assert f"the small host alone {behind(fresh, 'half', 'half_50'):.3f} worse (p = {p['0', 'half']:.3f})" in TEXT
    told = f"ahead at equal MACs by {behind(again, 'half_50', 'deep_75'):.3f} nats (p = {p['1000000', 'deep_75']:.3f})"
    assert told in TEXT and f"{len(values(fresh, 'half_50', 'macs'))} pairs the lead is gone" in TEXT
    assert f"with four times the steps growth at half loses {behind(fresh, 'half_50', 'deep'):.2f} on fresh text" in TEXT


def test_the_map(rows: Read) -> None:
    muon = [rows("growth_map", task__train_tokens=tokens) for tokens in ("0", "1000000")]
    cells = [*muon, rows("growth_map", "runs_adamw.csv")]
    assert all(behind(cell, arm, EQUAL[arm]) < 0 for cell in cells for arm in EQUAL) and "everywhere on the map" in TEXT
    assert all(behind(cell, arm, "deep") > 0 for cell in muon for arm in EQUAL) and "ahead everywhere under Muon" in TEXT
    small = sum(behind(cell, arm, HOST[arm]) >= 0 for cell in cells for arm in HOST)
    assert (small, len(cells) * len(HOST)) == (8, 12) and "In eight of the twelve cells of the map the small host alone" in TEXT
    first, second = (-behind(cell, "half_50", "deep_75") for cell in muon)
    assert f"a gain of {first:.2f} nats at equal MACs became a tie, and one of {second:.2f} a loss" in TEXT
    half, late = (fmean(behind(cell, arm, "deep") for cell in muon) for arm in ("half_50", "half_75"))
    told = f"growth at half loses {half:.2f} nats to the final net at {share(muon[0], 'half_50'):.0%}"
    assert told.replace("%", " %") in TEXT
    assert f"growth at three quarters {late:.2f} at {share(muon[0], 'half_75'):.0%}".replace("%", " %") in TEXT
    assert [len(values(cell, "half_50", "macs")) for cell in cells] == [4, 4, 1] and "four pairs a cell, and one with AdamW" in TEXT


def test_the_digits(rows: Read) -> None:
    runs = rows("digits_why")
    grown = values(runs, "grown", "test/accuracy")
    odd = min(grown, key=lambda seed: grown[seed])
    assert f"{len(grown)} of its 20 planned pairs" in TEXT and f"One of its ten grown runs reached only {100 * grown[odd]:.0f} %" in TEXT
    others = [row for row in runs if row["seed"] != odd]
    same = {f"{100 * fmean(values(others, arm, 'test/accuracy').values()):.0f} %" for arm in ("grown", "naive", "unfrozen")}
    assert len(same) == 1 and f"is as good as growing ({same.pop()})" in TEXT
    scratch, plain = (100 * behind(others, arm, "grown", "test/accuracy") for arm in ("scratch_macs", "plain_macs"))
    assert f"the net from scratch at equal MACs is {scratch:.1f} points better, and the plain perceptron at equal MACs {plain:.1f}." in TEXT


def test_the_defaults_and_plasticity(rows: Read, checkout: Path) -> None:
    assert "6 of 30 pairs" in TEXT and {row["seed"] for row in rows("defaults", task__name="mnist1d")} == set("012345")
    with (checkout / "experiments" / "plasticity" / "tuning.csv").open(newline="", encoding="utf-8") as file:
        tried: dict[tuple[str, str], dict[str, list[float]]] = {}
        for row in csv.DictReader(file):
            tried.setdefault((row["block"], row["arm"]), {}).setdefault(row["settings"], []).append(float(row["late_accuracy"]))
    best = {place: max(map(fmean, settings.values())) for place, settings in tried.items()}
    gaps = [best[block, "grown_l2"] - best[block, "continual_backprop"] for block in ("permuted", "shuffled")]
    assert abs(gaps[0]) < 0.02 and round(100 * gaps[1]) == -9 and "nine points worse when the labels are" in TEXT


@pytest.mark.slow
def test_every_recipe_is_made_of_settings_that_there_are(tmp_path: Path) -> None:
    table = PAGE.partition("| recipe | settings | page |")[2].partition("\n\n")[0]
    tried = set()
    for line in table.splitlines()[2:]:
        words: list[str] = []
        for code in re.findall(r"`([^`]+)`", line.split("|")[2]):
            given = code.replace("<folder>", str(tmp_path)).split()
            words = given if "=" in code else [*words[:-1], f"{words[-1].partition('=')[0]}={code}"]
            if "blueprint." in code and "blueprint=" not in " ".join(words):
                words = ["blueprint=block", *words]
            if not words[0].startswith("hydra."):
                compose(words)
                tried.add(" ".join(words))
    assert len(tried) > 15
