"""What a run says of itself: its name, and what differs from the defaults."""

from __future__ import annotations

import re

import pytest

from esper.cli.compose import compose
from esper.running.builders import describe_run
from esper.tracking import (
    CsvConfig,
    MlflowConfig,
    NoneConfig,
    build_trackers,
    differences,
    flatten,
    readable_name,
)


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
    assert readable_name("mlp-digits", {}, 0) == "mlp-digits seed=0"
    changed = {"trainer.steps": "60", "controller.name": "none", "seed": "3", "output": "x", "tracking.points": "9"}
    assert readable_name("mlp-digits", changed, 3) == "mlp-digits controller=none trainer.steps=60 seed=3"
    assert readable_name("mlp-digits", changed, 3, arm="late") == "mlp-digits late seed=3"
    many = readable_name("mlp-digits", {f"model.width_{i}": "1000" for i in range(20)}, 3)
    assert len(many) <= 100 and many.startswith("mlp-digits model.width_0=1000 ") and many.endswith(" … seed=3")


NAMED = {
    (): "mlp-digits seed=0",
    ("controller=none",): "mlp-digits controller=none seed=0",
    ("controller=random", "seed=1"): "mlp-digits controller=random seed=1",
    ("model=custom", "model.target=my_pkg.nets:Net", "task=custom", "task.target=my_pkg.data:shapes"): "Net-shapes seed=0",
    ("trainer.steps=60", "lifecycle=reference"): "mlp-digits lifecycle=reference trainer.steps=60 … seed=0",
    ("name=mine",): "mine seed=0",
}


@pytest.mark.parametrize("words", NAMED, ids=" ".join)
def test_runs_are_told_apart_by_name_and_say_of_what_they_are_made(words, tmp_path):
    config = compose([*words, "tracking=none"])
    info = describe_run(config, compose([]).task.build(), tmp_path, 0)
    assert re.sub(r" lifecycle\.\S+", "", info.name) == NAMED[words]
    assert list(info.chosen) == ["model", "task", "controller", "blueprint", "grafting"] and all(info.chosen.values())
    assert not info.chosen.keys() & info.changed.keys()


@pytest.mark.parametrize("config, kinds", [(NoneConfig(), []), (CsvConfig(), ["CsvFiles"]), (MlflowConfig(), ["MlflowSubprocess"])])
def test_the_parquet_files_come_first_whatever_the_tracking(config, kinds: list[str]):
    assert [type(tracker).__name__ for tracker in build_trackers(config)] == ["ParquetFiles", *kinds]
