"""The controller and the trackers in processes of their own: the same bits, whatever becomes of them on the way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from esper.checkpoint import disk
from esper.cli.resume import fork, resume
from esper.errors import UserError
from esper.running.run import run
from tests.here import here
from tests.resume.conftest import SHORT, Configure, configure
from tests.resume.killing import rows

pytestmark = pytest.mark.e2e
__all__ = ["configure"]

#: Enough steps that a seed germinates, and is judged, before and after a controller is killed.
STEPS = 60
WORDS = (*SHORT[1:], f"trainer.steps={STEPS}")
EXTERNAL = ("bus=embedded", "controller.process=external")
Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(tmp_path: Path, checkout: Path) -> Iterator[Start]:
    """Starts ``esper`` as a user would, beside the test; what still runs in the end is killed."""
    begun: list[subprocess.Popen[str]] = []

    def one(*words: str) -> subprocess.Popen[str]:
        environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "esper", *words]
        begun.append(subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        return begun[-1]

    yield one
    for process in begun:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def inside(tmp_path_factory: pytest.TempPathFactory, configure: Configure) -> Path:
    """The folder of the run with everything in one process."""
    output = tmp_path_factory.mktemp("inside")
    run(configure(*WORDS, f"output={output}"), output / "run", quiet=True)
    return output / "run"


def until(happened: Callable[[], Any], process: subprocess.Popen[str]) -> None:
    """Wait for something that ``process`` does."""
    deadline = time.monotonic() + 120
    while not happened():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def summary(folder: Path) -> dict[str, Any]:
    """``summary.json`` of a run."""
    found: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return found


def same(folder: Path, inside: Path) -> None:
    """Assert the same bits, the same transitions and nothing lost."""
    found, expected = summary(folder), summary(inside)
    assert found["status"] == "FINISHED"
    assert found["fingerprint"] == expected["fingerprint"]
    assert expected["seeds"]["germinated"] > 0
    assert rows(folder / "transitions.parquet") == rows(inside / "transitions.parquet") != []
    assert found["bus"]["dropped"] == found["bus"]["gaps"] == 0 < found["bus"]["sent"]


def test_controller_and_tracker_outside_killed_once_leave_what_a_run_with_both_inside_leaves(
    start: Start, tmp_path: Path, inside: Path
) -> None:
    folder = tmp_path / "run"
    trainer = start(*WORDS, *EXTERNAL, "tracking.process=external", f"hydra.run.dir={folder}")
    until((folder / "bus" / "join.json").exists, trainer)
    control, track = start("control", str(folder)), start("track", str(folder))
    memory = folder / "bus" / "controller" / "now.json"
    until(memory.exists, control)
    control.kill()
    control.wait()
    status = here("bus", "status", str(folder), "--json")
    assert status.returncode == 0, status.stderr
    streams = {stream["stream"]: stream for stream in json.loads(status.stdout)["streams"]}
    assert {group["name"] for group in streams["events"]["groups"]} >= {"controller"}
    track.kill()
    control, track = start("control", str(folder)), start("track", str(folder))
    for process in (trainer, control, track):
        assert process.wait(120) == 0, process.communicate()[1]
    same(folder, inside)
    assert rows(folder / "seeds.parquet") == rows(inside / "seeds.parquet")


def test_a_silent_controller_stops_the_run_which_goes_on_to_the_same_end(start: Start, tmp_path: Path, inside: Path) -> None:
    folder = tmp_path / "run"
    words = (*WORDS, *EXTERNAL, f"hydra.run.dir={folder}")
    trainer = start(*words, "controller.deadline_s=3")
    until((folder / "bus" / "join.json").exists, trainer)
    control = start("control", str(folder))
    until(lambda: disk.checkpoints(folder / disk.FOLDER), trainer)
    control.kill()
    _, said = trainer.communicate(timeout=60)
    assert trainer.returncode == 2 and "did not decide on tick" in said, said
    assert f"esper resume={folder}" in said and "Traceback" not in said
    stopped = summary(folder)
    assert stopped["status"] == "KILLED"
    assert resume(folder).state["trainer"]["steps"] == stopped["steps"] < STEPS
    trainer = start(f"resume={folder}", "controller.deadline_s=60")
    until((folder / "run.lock").exists, trainer)
    control = start("control", str(folder))
    assert trainer.wait(120) == 0, trainer.communicate()[1]
    same(folder, inside)


def test_a_killed_trainer_goes_on_beside_its_controller_to_the_same_end_and_is_not_forked(
    start: Start, tmp_path: Path, inside: Path
) -> None:
    folder = tmp_path / "run"
    trainer = start(*WORDS, *EXTERNAL, f"hydra.run.dir={folder}")
    until((folder / "bus" / "join.json").exists, trainer)
    control = start("control", str(folder))
    until(lambda: len(disk.checkpoints(folder / disk.FOLDER)) > 2, trainer)
    trainer.kill()
    trainer.wait()
    with pytest.raises(UserError, match=rf"go on without its memory: resume={folder}"):
        fork(folder)
    trainer = start(f"resume={folder}")
    assert trainer.wait(120) == 0, trainer.communicate()[1]
    assert control.wait(60) == 0, control.communicate()[1]
    same(folder, inside)


def test_parts_outside_need_a_bus_that_reaches_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for group in ("controller", "tracking"):
        done = here(f"{group}.process=external", "tracking=none" if group == "controller" else "tracking=csv")
        assert done.returncode == 2
        assert f"{group}.process=external needs a bus" in done.stderr and "bus=embedded" in done.stderr
