"""The studies with loops of their own in their smallest form: plasticity, mend, adapt, adapters."""

from __future__ import annotations

import csv
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

STUDIES = ("plasticity", "mend", "adapt", "adapters")
OURS = ("stream", "learners", "grown", "report", "study_runs", "small_study", "second_training")


@pytest.fixture
def study(checkout: Path, request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    """A study's program as a module; what it imports from beside itself is forgotten afterwards."""
    path, modules = list(sys.path), {name: sys.modules.pop(name, None) for name in OURS}
    spec = importlib.util.spec_from_file_location(f"study_{request.param}", checkout / "experiments" / request.param / "run.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path[:] = path
        for name, before in modules.items():
            sys.modules.pop(name, None)
            if before is not None:
                sys.modules[name] = before


@pytest.mark.usefixtures("processes")
@pytest.mark.slow
@pytest.mark.parametrize("study", ["mend"], indirect=True)
def test_a_study_tunes_runs_judges_and_writes_its_table_again_from_its_files(study: ModuleType, tmp_path: Path) -> None:
    quick = study.STUDY
    small = type(quick)(**{**vars(quick), "arms": ("seeds", "fine_tune", "nothing"), "blocks": ("dead",)})
    (tmp_path / "README.md").write_text("# Before\n<!-- results -->\nold\n<!-- end -->\nafter\n")
    assert small.main(["--quick", "--out", str(tmp_path), "--workers", "2"]) == 0
    text = (tmp_path / "README.md").read_text()
    assert text.count("| dead |") == 3 and "old" not in text and text.endswith("after\n")
    assert {"tuning.csv", "runs.csv", "results.md", "arms.png", "comparison_accuracy"} <= {path.name for path in tmp_path.iterdir()}
    (tmp_path / "README.md").write_text("<!-- results -->\n<!-- end -->")
    assert small.main(["--again", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "README.md").read_text().count("| dead |") == 3


@pytest.mark.slow
@pytest.mark.parametrize("study", ["mend"], indirect=True)
@pytest.mark.parametrize("damage", ["cut", "dead", "quantized"])
def test_every_damage_costs_accuracy_and_seeds_add_as_much_as_lora(study: ModuleType, damage: str) -> None:
    rows = {
        arm: study.one({"arm": arm, "block": damage, "seed": 0, "settings": {"lr": 0.01}, "steps": 60})
        for arm in ("nothing", "seeds", "lora")
    }
    assert rows["nothing"]["accuracy"] < rows["nothing"]["before_damage"] - 0.03
    assert rows["seeds"]["accuracy"] > rows["nothing"]["accuracy"]
    assert rows["seeds"]["added"] == pytest.approx(rows["lora"]["added"], rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("study", ["adapt"], indirect=True)
def test_a_host_that_learns_nothing_forgets_nothing_and_replay_keeps_what_was_known(study: ModuleType) -> None:
    rows = {
        arm: study.one({"arm": arm, "block": "new_classes", "seed": 0, "settings": {"lr": 0.01}, "steps": 60})
        for arm in ("nothing", "seeds", "seeds_replay")
    }
    assert rows["nothing"]["forgetting"] == 0.0 and rows["nothing"]["accuracy"] == 0.0
    assert rows["seeds"]["accuracy"] > 0.8 and rows["seeds_replay"]["forgetting"] < rows["seeds"]["forgetting"]


@pytest.mark.slow
@pytest.mark.parametrize("study", ["plasticity"], indirect=True)
def test_branches_are_taken_away_when_they_are_mature_and_others_germinate_at_once(study: ModuleType) -> None:
    settings = study.GRIDS["grown_l2"][0] | {"every": 60, "maturity": 50}
    runs = {arm: study.one({"arm": arm, "block": "shuffled", "seed": 0, "settings": settings, "tasks": 4}) for arm in ("grown_l2", "kept")}
    assert runs["grown_l2"]["culled"] == 3 and runs["grown_l2"]["germinated"] == 5  # 224 steps: at 60, 120, 180
    assert runs["kept"]["culled"] == 0 and runs["kept"]["germinated"] == 2


@pytest.mark.parametrize("study", ["plasticity"], indirect=True)
def test_continual_backprop_replaces_mature_units_alone_and_their_output_is_nothing(study: ModuleType) -> None:
    learner = study.learner("continual_backprop", {"base": "adam", "lr": 1e-3, "strength": 0.5}, 0, 0)
    learner.MATURITY = 3
    draws = torch.Generator().manual_seed(0)
    for _ in range(3):
        learner.step(torch.randn(8, 64, generator=draws), torch.arange(8))
    assert all(float(age.min()) == 3 for age in learner.age)
    learner.step(torch.randn(8, 64, generator=draws), torch.arange(8))
    before, behind = learner.pairs[0]
    new, old_behind = learner.age[0] == 0, learner.age[1] > 0
    assert int(new.sum()) == study.WIDTH // 2
    assert not behind.weight[old_behind][:, new].any() and behind.weight[old_behind][:, ~new].any()
    assert not learner.optimizer.state[before.weight]["exp_avg"][new].any()


@pytest.mark.parametrize("study", ["plasticity"], indirect=True)
def test_a_stream_is_the_same_for_the_same_seed_and_each_task_another(study: ModuleType) -> None:
    first, again = (list(study.tasks("permuted", 2, seed)) for seed in (1, 1))
    assert torch.equal(first[1].inputs, again[1].inputs) and not torch.equal(first[0].inputs, first[1].inputs)
    shuffled = list(study.tasks("shuffled", 2, 1))
    assert sorted(shuffled[0].labels.bincount().tolist()) == sorted(shuffled[1].labels.bincount().tolist())


@pytest.mark.slow
@pytest.mark.usefixtures("heavy_libraries")
@pytest.mark.parametrize("study", ["adapters"], indirect=True)
def test_every_arm_of_the_adapters_adapts_and_says_its_ranks(study: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "JUDGED", 2)
    ranks = dict.fromkeys(study.LAYERS, 2) | {study.LAYERS[0]: 0}
    given = {"block": "steps", "seed": 0, "steps": 30, "settings": {"lr": 0.03, "ranks": ranks}}
    rows = {arm: study.one({"arm": arm, **given}) for arm in ("nothing", "grown", "same_ranks")}
    assert rows["same_ranks"]["added"] == 2 * sum(study.host_sizes()[name] for name in study.LAYERS[1:])
    assert rows["same_ranks"]["loss"] < rows["nothing"]["loss"] - 0.2 and rows["nothing"]["added"] == 0
    assert rows["grown"].keys() == rows["nothing"].keys() and rows["grown"]["loss"] <= rows["nothing"]["loss"]
    assert study.ranks_for("same_ranks", rows["same_ranks"]) == ranks
    assert set(study.ranks_for("uniform", rows["same_ranks"]).values()) == {2}


def _as_if_trained(given: dict[str, Any]) -> dict[str, Any]:
    """A run of the study of adapters that costs nothing: a function of its arm and seed."""
    layers = sys.modules["study_adapters"].LAYERS
    grown = dict.fromkeys(layers, 2) | {layers[0]: 2 * given["seed"]}
    found = {"nothing": {}, "grown": grown}.get(given["arm"], given["settings"].get("ranks", {}))
    told = {f"rank.{name.removeprefix('transformer.h.')}": found.get(name, 0) for name in layers}
    return {"loss": 1.0 + given["seed"], "judge": -given["settings"]["lr"], "added": 1024 + 256 * given["seed"], **told}


@pytest.mark.slow
@pytest.mark.usefixtures("processes", "heavy_libraries")
@pytest.mark.parametrize("study", ["adapters"], indirect=True)
def test_arms_of_peft_follow_the_ranks_of_the_grown_run_of_their_pair(
    study: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study, "one", _as_if_trained)
    assert study.SHORT.main(["--quick", "--out", str(tmp_path), "--workers", "2"]) == 0
    with (tmp_path / "runs.csv").open() as file:
        rows = {(row["arm"], int(row["seed"])): row for row in csv.DictReader(file)}
    assert len(rows) == 10 and {arm for arm, _ in rows} == set(study.STUDY.arms)
    first = f"rank.{study.LAYERS[0].removeprefix('transformer.h.')}"
    assert [rows[arm, seed][first] for arm in ("grown", "same_ranks", "uniform") for seed in (0, 1)] == ["0", "2", "0", "2", "1", "1"]
    assert (tmp_path / "results.md").read_text().count("| steps |") == 5
