"""What a run says of itself: its name, and what differs from the defaults."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from esper.tracking import (
    CONFIGS,
    CsvConfig,
    MlflowConfig,
    NoneConfig,
    build_trackers,
    differences,
    flatten,
    readable_name,
)

CONF = Path(__file__).resolve().parents[2] / "conf" / "tracking"


def test_only_what_differs_from_the_defaults_is_a_parameter():
    defaults = {"seed": 0, "trainer": {"steps": 100, "clip": 1.0}, "sites": {"match": ["a"]}, "gone": {"x": 1}}
    config = {
        "seed": 0,
        "trainer": {"steps": 200, "clip": 1.0},
        "sites": {"match": ["a", "b"]},
        "new": None,
        "gone": {},
    }
    assert differences(config, defaults) == {
        "trainer.steps": "200",
        "sites.match": "['a', 'b']",
        "new": "None",
        "gone": "{}",
    }
    assert differences(defaults, defaults) == {}


def test_flattening_joins_keys_with_dots_and_leaves_lists():
    assert flatten({"a": {"b": {"c": 1}}, "d": [1, {"e": 2}]}) == {"a.b.c": 1, "d": [1, {"e": 2}]}


def test_a_person_can_read_the_name():
    assert readable_name("mlp", "digits", "linear", 0) == "digits-mlp seed=0 linear"
    assert readable_name("mlp", "digits", "linear", 3, arm="late") == "digits-mlp seed=3 late"


@pytest.mark.parametrize("name", CONFIGS)
def test_the_files_in_conf_hold_the_defaults_of_the_dataclasses(name: str):
    assert OmegaConf.to_container(OmegaConf.load(CONF / f"{name}.yaml")) == asdict(CONFIGS[name]())
    assert {path.stem for path in CONF.glob("*.yaml")} == set(CONFIGS)


@pytest.mark.parametrize(
    "config, kinds", [(NoneConfig(), []), (CsvConfig(), ["CsvFiles"]), (MlflowConfig(), ["MlflowApart"])]
)
def test_the_parquet_files_come_first_whatever_the_tracking(config, kinds: list[str]):
    assert [type(tracker).__name__ for tracker in build_trackers(config)] == ["ParquetFiles", *kinds]
