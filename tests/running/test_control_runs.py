"""The control kept between runs is the host of this run alone, or it is made again."""

from __future__ import annotations

import importlib
import json
import multiprocessing
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from esper.cli.compose import compose
from esper.running import builders, control_runs
from esper.running.control_runs import control_run

BRIEF = ["trainer.steps=20", "trainer.validate_every=50%", "tracking=none", "trainer.batch_size=16"]
CPU = torch.device("cpu")


def made(folder: Path, *words: str) -> dict[str, Any]:
    """The control of a run of these words."""
    config = compose([*BRIEF, *words])
    return control_run(config, config.task.build(), CPU, 20, folder / "controls")


@pytest.mark.slow
def test_other_data_under_the_same_name_get_a_control_of_their_own(tmp_path: Path):
    text = tmp_path / "a.txt"
    words = ["model=transformer", "model.width=16", "task=text", "task.context=8", f"task.path={text}"]
    text.write_text("to be or not to be, that is the question. " * 100)
    before = made(tmp_path, *words)
    assert made(tmp_path, *words) == before
    text.write_text("whether 'tis nobler in the mind to suffer? " * 100)
    after = made(tmp_path, *words)
    assert after["metrics"]["test/loss"] != before["metrics"]["test/loss"]
    assert len(list((tmp_path / "controls").iterdir())) == 2


def test_other_weights_under_the_same_name_get_a_control_of_their_own(tmp_path: Path):
    config = compose(BRIEF)
    weights = tmp_path / "start.safetensors"
    save_file(builders.build_host(config, config.task.build()).state_dict(), weights)
    before = made(tmp_path, f"model.weights={weights}")
    save_file({name: value * 2 for name, value in load_file(weights).items()}, weights)
    assert made(tmp_path, f"model.weights={weights}")["metrics"] != before["metrics"]


NET = """
from math import prod

from torch import nn

class Net(nn.Sequential):
    def __init__(self, task):
        super().__init__(nn.Flatten(), nn.Linear(prod(task.input_shape), 6), nn.{activation}(), nn.Linear(6, task.outputs))
"""


def test_other_code_under_the_same_name_gets_a_control_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ESPER_ALLOW", "my_net")
    monkeypatch.syspath_prepend(tmp_path)
    metrics = []
    for activation in ("ReLU", "Sigmoid"):
        (tmp_path / "my_net.py").write_text(NET.replace("{activation}", activation))
        monkeypatch.delitem(sys.modules, "my_net", raising=False)
        importlib.invalidate_caches()
        metrics.append(made(tmp_path, "model=custom", "model.target=my_net:Net", "sites.match=['1']")["metrics"])
    assert metrics[0] != metrics[1]


def test_a_control_keeps_its_curves(tmp_path: Path):
    told = made(tmp_path)
    curve = told["curves"]["validation/accuracy"]
    assert curve[-1][1:] == [told["macs"], told["metrics"]["validation/accuracy"]]
    assert [tick for tick, _, _ in curve] == sorted({int(tick) for tick, _, _ in curve}), "each tick once"


def test_a_kept_control_that_no_longer_reads_is_made_again(tmp_path: Path):
    before = made(tmp_path)
    (path,) = (tmp_path / "controls").iterdir()
    path.write_text('{"steps": 20, "met')
    assert made(tmp_path)["metrics"] == before["metrics"]
    assert json.loads(path.read_text())["metrics"] == before["metrics"]


@pytest.mark.usefixtures("processes")
def test_two_workers_may_keep_the_same_control_at_the_same_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The other one writes and renames between this one's writing and renaming."""
    path, replace = tmp_path / "key.json", Path.replace

    def overtaken(self: Path, target: Path) -> Path:
        monkeypatch.setattr(Path, "replace", replace)
        other = multiprocessing.get_context("fork").Process(target=control_runs._write, args=(path, {"by": "other"}))
        other.start()
        other.join()
        assert other.exitcode == 0
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", overtaken)
    control_runs._write(path, {"by": "us"})
    assert json.loads(path.read_text()) == {"by": "us"}
    assert [file.name for file in tmp_path.iterdir()] == ["key.json"]
