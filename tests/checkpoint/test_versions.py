"""What was saved by an earlier version goes on; what a later one saved is refused by its name."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from esper.checkpoint import disk, schema
from esper.checkpoint.schema import SCHEMA, UPGRADES, Upgrade
from esper.checkpoint.tree import join, same, split
from esper.errors import UserError
from tests.checkpoint.conftest import Make
from tests.checkpoint.samples.make import HERE, STEP, WORDS

VERSIONS = range(1, SCHEMA + 1)


def test_every_version_has_a_sample_and_a_way_to_the_next_one() -> None:
    assert sorted(int(path.name) for path in HERE.iterdir() if path.name.isdigit()) == list(VERSIONS)
    assert sorted(UPGRADES) == list(range(1, SCHEMA))


@pytest.mark.parametrize("version", VERSIONS)
def test_a_sample_is_taken_over_to_the_last_bit_and_goes_on(make: Make, version: int) -> None:
    checkpoint, state = disk.read(HERE / str(version))
    assert checkpoint.manifest["schema"] == version and checkpoint.step == STEP
    trainer = make(*WORDS, state=state["trainer"])
    again = join(*split(trainer.state()))
    for part in state["trainer"]:
        assert holds(_timeless(again[part]), _timeless(state["trainer"][part])), part
    trainer.fit()
    assert trainer.outcome.steps == 60
    losses = [value for tick, name, value in trainer.outcome.history if name == "train/loss" and tick > STEP]
    assert losses and all(map(math.isfinite, losses))
    for branch, saved in zip(
        trainer.grow.registry.branches.entries, state["trainer"]["grow"]["garden"]["branches"]["entries"], strict=True
    ):
        assert [list(step) for step in branch.path[: len(saved["path"])]] == saved["path"]
        assert len(branch.path) > len(saved["path"])


def holds(now: Any, saved: Any) -> bool:
    """Whether everything that was saved is there with the same bits; a later version may hold more."""
    if isinstance(saved, dict):
        return isinstance(now, dict) and all(key in now and holds(now[key], value) for key, value in saved.items())
    if isinstance(saved, list):
        return isinstance(now, list) and len(now) == len(saved) and all(map(holds, now, saved))
    return same(now, saved)


def _timeless(part: Any) -> Any:
    return {key: value for key, value in part.items() if key != "seconds"} if isinstance(part, dict) else part


def test_a_version_that_is_made_up_is_brought_to_the_next_step_by_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = disk.write(disk.copy({"weights": torch.ones(2), "old": 1}, 3, 3, {}, None), tmp_path).path

    def renamed(state: dict[str, Any]) -> dict[str, Any]:
        return {"new" if key == "old" else key: value for key, value in state.items()}

    def doubled(state: dict[str, Any]) -> dict[str, Any]:
        return {**state, "new": 2 * state["new"]}

    later = {SCHEMA: Upgrade(state=renamed), SCHEMA + 1: Upgrade(state=doubled, manifest=lambda manifest: {**manifest, "told": True})}
    monkeypatch.setattr(schema, "UPGRADES", UPGRADES | later)
    for module in (schema, disk):
        monkeypatch.setattr(module, "SCHEMA", SCHEMA + 2)
    checkpoint, state = disk.read(path)
    assert checkpoint.manifest["told"] and checkpoint.manifest["schema"] == SCHEMA
    assert same(state, {"weights": torch.ones(2), "new": 2})


def test_an_upgrade_that_does_not_find_what_it_needs_refuses_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = disk.write(disk.copy({"weights": torch.ones(2)}, 3, 3, {}, None), tmp_path).path
    monkeypatch.setattr(schema, "UPGRADES", UPGRADES | {SCHEMA: Upgrade(state=lambda state: {"new": state["old"]})})
    for module in (schema, disk):
        monkeypatch.setattr(module, "SCHEMA", SCHEMA + 1)
    with pytest.raises(UserError, match="cannot be used: 'old' is missing"):
        disk.read(path)


def test_one_of_a_later_version_is_refused_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "SCHEMA", SCHEMA + 1)
    path = disk.write(disk.copy({"weights": torch.ones(2)}, 3, 3, {}, None), tmp_path).path
    monkeypatch.undo()
    with pytest.raises(UserError, match=rf"has schema {SCHEMA + 1}, and this esper reads up to {SCHEMA}: install the version"):
        disk.read(path)
