"""The study of harm runs on the present engine: every hostile kind, every host, and a table that counts what it says."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


@pytest.fixture(scope="module")
def study(checkout: Path) -> ModuleType:
    """The study as a module."""
    spec = importlib.util.spec_from_file_location("do_no_harm", checkout / "experiments" / "do_no_harm" / "run.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


SHORT = ("trainer.steps=60", "trainer.batch_size=32", "telemetry.every=20", "tracking=none")
RUNS = [("mlp", seed) for seed in range(6)] + [("cnn", 1), ("transformer", 3)]


@pytest.mark.parametrize(("host", "seed"), RUNS)
@pytest.mark.slow
def test_a_hostile_run_comes_to_its_end_and_its_twin_grows_nothing(study: ModuleType, host: str, seed: int) -> None:
    config, task = study.prepared(SHORT, host)
    grown, twin = (study.one(config, task, seed, seed, arm) for arm in ("grown", "twin"))
    assert grown["kind"] == study.KINDS[seed] and not grown["stopped"] and 0.0 < grown["accuracy"] <= 1.0
    assert grown["germinated"] > 0 and twin["germinated"] == 0


def test_what_a_hostile_branch_draws_is_a_matter_of_its_seed_and_no_setting(study: ModuleType) -> None:
    config, task = study.prepared(SHORT, "mlp")
    assert study.one(config, task, 3, 3, "grown") == study.one(config, task, 3, 3, "grown")


def rows(harm: dict[int, float]) -> list[dict[str, Any]]:
    """A hundred seeds whose twins differ by up to 0.1; ``harm`` is what a grown run is worse than its twin."""
    none = dict.fromkeys(("germinated", "fossilized", "culled", "rolled_back", "slow_harm", "host_returned", "rollbacks"), 0)
    found = []
    for seed in range(100):
        by_arm = {"twin": 0.8, "other order": 0.7 if seed < 4 else 0.8, "grown": 0.8 - harm.get(seed, 0.0)}
        kinds = {arm: "good" if arm == "grown" else "" for arm in by_arm}
        found += [
            {"arm": a, "seed": seed, "kind": kinds[a], "strategy": "", "accuracy": v, "loss": 1 - v, "primary": v, "stopped": "", **none}
            for a, v in by_arm.items()
        ]
    return found


@pytest.mark.parametrize(("harm", "count", "code"), [({}, 0, 0), ({7: 0.2}, 1, 0), ({7: 0.2, 8: float("nan")}, 2, 1)])
def test_the_table_counts_who_is_beyond_the_limit_and_keeps_the_others(
    study: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harm: dict[int, float], count: int, code: int
) -> None:
    monkeypatch.setattr(study, "HERE", tmp_path)
    monkeypatch.setattr(study, "KINDS", ("good",))
    (tmp_path / "README.md").write_text("# Before\n<!-- results -->\nold\n<!-- end -->\nafter\n")
    assert study.report(rows(harm), "results", ["a=1"]) == code
    assert study.report(rows(harm), "results-cnn", ["a=1"]) == code
    text = (tmp_path / "README.md").read_text()
    assert text.count(f"| as trained | {count} of 100 | {count} of 100 | 0 |") == 2
    assert text.count("| with `trainer.keep=better` | 0 of 100 | 0 of 100 |") == 2
    assert "old" not in text and text.count(f"**{count} of 100**") == 2
    assert text.startswith("# Before") and "after" in text and "## results-cnn" in text


def test_what_is_kept_is_decided_by_validation_alone_and_a_stopped_run_has_no_twin_to_fall_back_on(study: ModuleType) -> None:
    found = rows({7: 0.2, 8: 0.3})
    for row in found:
        row["primary"] = 0.8 if row["seed"] == 7 else row["primary"]  # worse on the test set, which nobody may look at
        row["stopped"] = "rolled back too often" if (row["seed"], row["arm"]) == (8, "grown") else ""
    arms = {arm: {row["seed"]: row for row in found if row["arm"] == arm} for arm in ("twin", "other order", "grown")}
    kept = study.better(arms)
    assert kept[7]["arm"] == kept[8]["arm"] == "grown" and study.beyond(kept, arms, "accuracy") == [7, 8]


def test_the_table_is_written_again_from_the_file_and_one_of_before_says_what_was_not_measured(
    study: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study, "KINDS", ("good",))
    study.write(rows({7: 0.2}), tmp_path / "results.csv")
    assert study.main(["--again", "--folder", str(tmp_path)]) == 0
    first = (tmp_path / "README.md").read_text()
    assert "| with `trainer.keep=better` | 0 of 100 | 0 of 100 | 1 |" in first
    header, *lines = (tmp_path / "results.csv").read_text().splitlines()
    place = header.split(",").index("primary")
    cut = [",".join(cell for number, cell in enumerate(line.split(",")) if number != place) for line in (header, *lines)]
    (tmp_path / "results.csv").write_text("\n".join(cut) + "\n")
    assert study.main(["--again", "--folder", str(tmp_path)]) == 0
    assert "| with `trainer.keep=better` | not measured |" in (tmp_path / "README.md").read_text()
