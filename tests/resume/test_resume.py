"""A run that did not end goes on with the same bits; what would change them is refused."""

from __future__ import annotations

import logging
import math
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from esper.checkpoint import disk
from esper.cli.resume import auto, refuse_changes, resume
from esper.cli.resume import main as go_on
from esper.compare.fingerprint import same_bits
from esper.errors import UserError
from esper.report.summary_file import read_summary
from esper.running.checkpointing import _score
from esper.running.resume import Start, unfinished
from esper.running.run import run
from esper.running.run_folder import hold_folder
from esper.trainer.trainer import Outcome
from tests.resume import killing
from tests.resume.conftest import SHORT, Configure, copied


@pytest.mark.parametrize("step", [28, 64])
def test_killed_and_resumed_it_leaves_what_an_undisturbed_run_leaves(
    configure: Configure, finished: Path, tmp_path: Path, step: int
) -> None:
    config, log, folder = configure(f"output={tmp_path}"), tmp_path / "log", tmp_path / "day" / "run"
    folder.mkdir(parents=True)
    killed = killing.child(lambda: killing.start(config, folder), log, kill_when=killing.reached(folder, step))
    assert killed.code == -9
    assert killing.child(lambda: killing.go_on(config, folder), log).code == 0, log.read_text()
    assert killing.differences(folder, finished) == []


@pytest.mark.usefixtures("processes")
def test_sigterm_saves_and_ends_with_75_and_resume_ends_the_same(configure: Configure, tmp_path: Path, checkout: Path) -> None:
    """The same as an undisturbed run, to the last row; sent as soon as there is a checkpoint, so at no chosen step."""
    words = [*SHORT, "trainer.steps=1200", "trainer.checkpoint_keep=2", "trainer.checkpoint_every=2%"]
    undisturbed, folder = tmp_path / "alone" / "day" / "run", tmp_path / "day" / "run"
    run(configure(*words, f"output={tmp_path / 'alone'}"), undisturbed, quiet=True)
    places = [f"output={tmp_path}", f"hydra.run.dir={folder}"]
    process = subprocess.Popen([sys.executable, "-m", "esper", *words, *places], cwd=checkout, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not disk.checkpoints(folder / disk.FOLDER):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 75
    assert process.stderr is not None and "everything is saved" in process.stderr.read()
    before = read_summary(folder)
    assert before["status"] == "KILLED" and not (folder / "run.lock").exists() and 0 < before["steps"] < 1200
    assert int(disk.checkpoints(folder / disk.FOLDER)[-1].name) == before["steps"]
    start = resume(folder)
    assert start.state["trainer"]["steps"] == before["steps"]
    run(start.config, start.folder, quiet=True, state=start.state)
    assert read_summary(folder)["seeds"]["germinated"] > 0 and same_bits(folder, undisturbed)
    assert killing.differences(folder, undisturbed) == []


def test_a_longer_run_goes_on_from_the_end_of_a_finished_one(finished: Path, tmp_path: Path) -> None:
    folder = copied(finished, tmp_path)
    with pytest.raises(UserError, match=r"is finished; to train it longer give trainer.steps"):
        resume(folder)
    start = resume(folder, ["trainer.steps=90"])
    result = run(start.config, start.folder, quiet=True, state=start.state)
    assert result.summary["steps"] == 90


def test_overrides_that_change_the_bits_are_refused_with_the_way_out(finished: Path) -> None:
    refuse_changes(["trainer.steps=100", "trainer.device=cpu", "tracking=none", "trainer.checkpoint_keep=5"], finished)
    for word in ("optimizer.lr=0.1", "seed=4", "trainer.batch_size=8", "model=cnn"):
        with pytest.raises(UserError, match=f"fork={finished} {word}"):
            refuse_changes([word], finished)


def test_auto_finds_the_run_of_this_configuration_that_did_not_end(
    configure: Configure, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = configure(f"output={tmp_path}")
    assert unfinished(config) is None
    assert auto(config, tmp_path / "new") is None
    folder = copied(finished, tmp_path, until=79)
    *_, last = sorted((folder / disk.FOLDER).iterdir())
    (last / disk.TENSORS).write_bytes((last / disk.TENSORS).read_bytes()[:-5])
    found = auto(config, tmp_path / "new")
    assert found is not None and found.folder == folder and found.state["trainer"]["steps"] < int(last.name)
    assert "truncated" in capsys.readouterr().err
    with pytest.raises(UserError, match="truncated"):
        resume(folder)
    assert unfinished(configure(f"output={tmp_path}", "seed=1")) is None
    with hold_folder(config, folder), pytest.raises(UserError, match="under way"):
        unfinished(config)


@pytest.mark.parametrize(("direction", "score"), [("max", 0.9), ("min", -0.9)])
def test_a_checkpoint_has_the_score_of_the_last_validation_however_long_ago_it_was(direction: str, score: float) -> None:
    task = SimpleNamespace(primary="quality", metrics={"quality": SimpleNamespace(direction=direction)})
    said = [(tick, "train/loss", 1.0) for tick in range(2, 1000)]
    before, last = (1, "validation/quality", 0.5), (1, "validation/quality", 0.9)
    assert _score(SimpleNamespace(task=task, outcome=Outcome(history=[before, last, *said]))) == score
    assert _score(SimpleNamespace(task=task, outcome=Outcome(history=[before, (1, "validation/quality", math.nan), *said]))) is None
    assert _score(SimpleNamespace(task=task, outcome=Outcome(history=said))) is None


def test_the_checkpoint_before_can_be_asked_for(finished: Path, tmp_path: Path) -> None:
    folder = copied(finished, tmp_path)
    first = disk.checkpoints(folder / disk.FOLDER)[0]
    assert resume(first).state["trainer"]["steps"] == int(first.name)


def test_two_processes_do_not_run_in_one_folder(configure: Configure, tmp_path: Path) -> None:
    config = configure(f"output={tmp_path}")
    with hold_folder(config, tmp_path), pytest.raises(UserError, match="Another process is running"), hold_folder(config, tmp_path):
        pass
    assert not (tmp_path / "run.lock").exists()


def test_warnings_of_a_run_that_goes_on_reach_the_terminal_and_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def warn(*_: Any, **__: Any) -> None:
        logging.getLogger("esper.tracking").error("the tracker is lost")
        logging.info("a detail")

    monkeypatch.setattr("esper.running.run.run", warn)
    monkeypatch.setattr("esper.cli.resume.resume", lambda *words: Start(None, tmp_path, None))  # type: ignore[arg-type]
    go_on([f"resume={tmp_path}"])
    assert capsys.readouterr().err == "the tracker is lost\n"
    log = (tmp_path / "esper.log").read_text()
    assert "ERROR esper.tracking: the tracker is lost" in log and "INFO root: a detail" in log
