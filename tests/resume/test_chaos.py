"""A slice of ``scripts/chaos resume``, and kills at chosen places: in a transition, a save, a flush of the bus, a tracker's write."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest

from esper.bus.server.sender import Sender
from esper.bus.trainer.telemetry_ring import TelemetryRing
from esper.engine.transitions import Transitions
from esper.tracking import csv_files
from tests.resume import killing
from tests.resume.conftest import Configure
from tests.resume.killing import Place


@pytest.fixture(scope="module")
def suite(checkout: Path) -> ModuleType:
    """The suite as a module."""
    spec = importlib.util.spec_from_file_location("chaos_resume", checkout / "scripts" / "chaos_suites" / "resume.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.usefixtures("processes")
def test_a_slice_of_the_suite_over_three_hosts(suite: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["mlp scheduled", "cnn block drift", "transformer block random"]
    assert suite.main(["--dry", "--kills", "4", "--each", "2", "--seed", "1", "--only", *names]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["kills"] >= 4 and sorted(report["by_run"]) == sorted(names)
    assert all(run["runs"] and run["undisturbed"]["furthest"] == "FOSSILIZED" for run in report["by_run"].values())


@pytest.mark.parametrize(("name", "doubled"), [("metrics.csv", ",train/loss,"), ("events.jsonl", '"Transition"')])
def test_a_line_said_twice_is_noticed(finished: Path, tmp_path: Path, name: str, doubled: str) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    lines = (folder / name).read_text().splitlines(keepends=True)
    (folder / name).write_text("".join([*lines, next(line for line in lines if doubled in line)]))
    assert killing.differences(folder, finished) == [name]


PLACES = {
    "before a checkpoint is renamed": Place(os, "rename", 2),
    "after a checkpoint was renamed": Place(os, "rename", 2, after=True),
    "in a transition": Place(Transitions, "_carry_out", 9),
    "after a germination": Place(Transitions, "germinate", 3, after=True),
    "in a flush of telemetry": Place(TelemetryRing, "_emit_upto", 5),
}


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES.keys())
def test_killed_there_and_resumed_it_ends_as_an_undisturbed_run(configure: Configure, finished: Path, tmp_path: Path, place: Place) -> None:
    assert killed_there(configure, finished, tmp_path, [place]) == []


@pytest.mark.server
def test_killed_when_the_server_has_a_batch_and_the_writer_does_not_know_it_yet(
    configure: Configure, finished: Path, tmp_path: Path
) -> None:
    (other,) = killed_there(configure, finished, tmp_path, [Place(Sender, "_settle", 9)], "bus=embedded")
    assert other.startswith("summary config_hash")  # the undisturbed run had its bus in memory


@pytest.mark.parametrize("number", [1, 2])
def test_killed_again_while_the_csv_files_are_cut(configure: Configure, finished: Path, tmp_path: Path, number: int) -> None:
    places = [Place(Transitions, "_carry_out", 9), Place(csv_files, "_replace", number)]
    assert killed_there(configure, finished, tmp_path, places) == []


def killed_there(configure: Configure, finished: Path, output: Path, places: list[Place], *words: str) -> list[str]:
    """One life a place, each killed there, and a last one that comes to the end; what it left otherwise than the finished run."""
    config, folder, log = configure(*words, f"output={output}"), output / "day" / "run", output / "log"
    folder.mkdir(parents=True)
    for place in places:

        def dies(place: Place = place) -> None:
            place.trap()
            killing.go_on(config, folder)

        assert killing.child(dies, log).code == -9, log.read_text()
    assert killing.child(lambda: killing.go_on(config, folder), log).code == 0, log.read_text()
    return killing.differences(folder, finished)
