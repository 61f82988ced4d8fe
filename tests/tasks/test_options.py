"""Every option of the groups ``task`` and ``model`` is one dataclass and one file that say the same."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from esper.hosts import CONFIGS as HOSTS
from esper.tasks import CONFIGS as TASKS

CONF = Path(__file__).parents[2] / "conf"
OPTIONS = [("task", name, kind) for name, kind in TASKS.items()] + [("model", name, kind) for name, kind in HOSTS.items()]


@pytest.mark.parametrize(("group", "name", "kind"), OPTIONS)
def test_the_file_holds_the_dataclass_defaults(group: str, name: str, kind: type) -> None:
    loaded = OmegaConf.load(CONF / group / f"{name}.yaml")
    assert OmegaConf.to_container(loaded) == dataclasses.asdict(kind())
    assert OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), loaded)) == kind()


@pytest.mark.parametrize("group", ["task", "model"])
def test_every_file_is_a_dataclass_or_a_variant_of_one(group: str) -> None:
    known = {name for owner, name, _ in OPTIONS if owner == group}
    assert {OmegaConf.load(path).name for path in (CONF / group).glob("*.yaml")} - {"custom"} == known
