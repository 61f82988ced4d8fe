"""The study of the crippled layer in its smallest form: few units of that layer work, and the table counts who grew there."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from studies import study

import esper.learn.training
from esper.seeds import find_sites


@pytest.fixture
def folder(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The study's own folder, on the path as its program has it."""
    place = checkout / "experiments" / "crippled_layer"
    monkeypatch.syspath_prepend(str(place))
    yield place
    for name in ("crippled", "report"):
        sys.modules.pop(name, None)


def test_a_crippled_layer_keeps_few_working_units_and_the_others_are_whole(folder: Path) -> None:
    from crippled import PART, Host, sums

    host = Host(layers=4, width=16, crippled=2, alive=PART)
    inputs = torch.randn(32, 4 * PART)
    alive = [int((host.get_submodule(f"layer{k}")(inputs[:, k * PART : (k + 1) * PART]) != 0).any(0).sum()) for k in range(4)]
    assert alive == [16, 16, PART, 16]
    assert [site.name for site in find_sites(host, [*host.growth_sites], 4, lambda: host(inputs))] == [f"layer{k}" for k in range(4)]
    task = sums(layers=4, samples=200, seed=1)
    x, y = task.train[0]
    assert x.shape == (4 * PART,) and y.ndim == 0 and task.primary == "error"


@pytest.mark.usefixtures("whole_runs")
def test_the_quick_form_runs_every_kind_of_arm_and_writes_the_page(
    checkout: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = study(checkout, "crippled_layer")
    memory = {"memory": str(tmp_path / "memory.json"), "steps": 120}
    jobs = [{"phase": "pilot", "arm": "wiser_bandit", "seed": 7, "remember": True} | memory]
    jobs += [
        {"phase": "study", "arm": arm, "seed": 1, "steps": 120} for arm in ("healthy", "host", "by_health", "by_probe", "by_allocator")
    ]
    rows = module.chain(jobs)
    by_arm = {row["arm"]: row for row in rows}
    assert by_arm["healthy"]["error"] < by_arm["host"]["error"], "crippling hurts"
    assert by_arm["by_health"]["there"] >= 5 and by_arm["by_allocator"]["there"] >= 5, "of six, at one of six layers"
    assert by_arm["by_probe"]["kept"] <= 2 < by_arm["by_probe"]["germinated"], "losers go, also those that have passed their first look"
    assert (tmp_path / "memory.json").exists() and by_arm["wiser_bandit"]["crippled"] == 1
    taught = module.lessons(2, 120, tmp_path)
    assert [(job["arm"], job["seed"]) for job in taught] == [("by_lot", 1000), ("by_lot", 1001), ("by_health", 1000), ("by_health", 1001)]
    monkeypatch.setattr(esper.learn.training, "IMITATION", 5)
    lesson = module.chain(taught[1:3])
    weights = module.learnt(taught[1:3], tmp_path / "policy.safetensors")
    (decided,) = module.chain([{"phase": "study", "arm": "by_policy", "seed": 1, "steps": 120, "weights": str(weights)}])
    assert decided["germinated"] <= 6 and {row["phase"] for row in lesson} == {"lesson"}
    rows += [*lesson, decided]
    module.machine(tmp_path, "--seeds 1", "in a moment")
    text = module.write_up(rows, tmp_path, module.LAYERS, module.EVENTS, list(module.ARMS))
    assert "by_health" in text and (tmp_path / "found.png").stat().st_size > 1000


def test_what_an_arm_reached_is_said_as_it_is(checkout: Path, folder: Path) -> None:
    module = study(checkout, "crippled_layer")
    common = {"phase": "study", "germinated": 6, "kept": 2, "kept_there": 1}
    errors = {"healthy": 0.1, "host": 1.1, "by_lot": 1.1, "by_health": 0.19, "by_bandit": 0.19, "by_probe": 0.5}
    there = {"by_lot": 1, "by_health": 5, "by_bandit": 4, "by_probe": 6}
    rows = [
        common | {"arm": arm, "seed": seed, "error": error + 0.001 * seed, "there": there.get(arm, 0)}
        for arm, error in errors.items()
        for seed in range(3)
    ]
    found = module.summed_up(rows, list(errors))
    assert found["by_health"]["recovered"] == pytest.approx(0.91) and found["by_health"]["share"] == pytest.approx(5 / 6)
    reached = {arm: module.verdict(found[arm]) for arm in there}
    assert reached == {"by_lot": "neither", "by_health": "both", "by_bandit": "recovery alone", "by_probe": "share alone"}
