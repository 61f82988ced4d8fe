"""The study of the controllers in its smallest form: every arm runs, and verdicts follow the test."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
from studies import study


@pytest.mark.usefixtures("whole_runs")
@pytest.mark.parametrize("arm", ["host", "any_time", "at_35", "by_health", "wiser_bandit", "by_probe", "by_allocator"])
def test_every_arm_runs_and_spends_at_most_its_six_events(checkout: Path, tmp_path: Path, arm: str) -> None:
    module = study(checkout, "ab_controller")
    job = {"phase": "pilot", "task": "mnist1d", "arm": arm, "seed": 3, "steps": 60}
    if arm == "wiser_bandit":
        job |= {"memory": str(tmp_path / "memory.json"), "remember": True}
    (row,) = module.chain([job])
    assert set(row) == set(module.COLUMNS) and 0.0 < row["accuracy"] <= 1.0
    assert row["germinated"] == 0 if arm == "host" else 0 < row["germinated"] <= 6
    assert (tmp_path / "memory.json").exists() is (arm == "wiser_bandit")


@pytest.mark.usefixtures("whole_runs")
def test_the_policy_is_learnt_from_the_pilots_and_decides_in_the_study(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = study(checkout, "ab_controller")
    for passes in ("IMITATION", "IMPROVEMENT"):
        monkeypatch.setattr(f"esper.learn.training.{passes}", 5)
    for jobs in module.pilots("mnist1d", 1, 60, tmp_path)[-2:]:
        module.chain(jobs)
    module.learnt("mnist1d", tmp_path)
    (job,) = [job for jobs in module.studied("mnist1d", 1, 60, tmp_path) for job in jobs if job["arm"] == "by_policy"]
    (row,) = module.chain([job])
    assert set(row) == set(module.COLUMNS) and row["germinated"] <= 6


def rows(module: ModuleType, lead: dict[str, float]) -> list[dict[str, object]]:
    """A study of ten seeds in which some arms lead ``at_20``, the best fixed schedule, by so much."""
    common = {"phase": "study", "task": "mnist1d", "macs": 10, "parameters": 5, "germinated": 6, "fossilized": 2}
    made = []
    for seed in range(10):
        for arm in module.ARMS:
            accuracy = 0.5 + 0.001 * seed + lead.get(arm, 0.0005 * (-1) ** seed)
            made.append(
                common | {"arm": arm, "seed": seed, "accuracy": accuracy, "validation_accuracy": accuracy + 0.01 * (arm == "at_20")}
            )
    return made


def test_a_verdict_is_that_of_the_test_and_says_when_nothing_wins(checkout: Path) -> None:
    module = study(checkout, "ab_controller")
    made = rows(module, {"at_20": 0.0, "by_probe": 0.03, "by_bandit": -0.03})
    assert module.best_fixed(made, "mnist1d") == "at_20"
    text = {line.split("`")[1]: line for line in module.table(made, "mnist1d", "at_20")[2:]}
    assert "beats it" in text["by_probe"] and "is worse" in text["by_bandit"] and "does not beat it" in text["by_health"]
    assert "reference" in text["at_20"] and "1.00 × host" in text["host"]
