"""What cannot go on as it began is refused in a sentence, before anything in the run's folder changes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from esper.app import main
from esper.checkpoint import disk
from esper.checkpoint.tree import join, split
from esper.cli.resume import fork, resume
from esper.config import GROUPS
from esper.errors import UserError
from esper.running.provenance import processor
from esper.running.resume import unfinished
from esper.running.run import run
from tests.resume.conftest import Configure, copied


def test_what_is_no_run_is_said_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([f"resume={tmp_path}"]) == 2
    assert "is no run's folder" in capsys.readouterr().err
    (tmp_path / "config.yaml").write_text("a: [")
    assert main([f"resume={tmp_path}", "trainer.steps=3"]) == 2
    assert "cannot be read" in capsys.readouterr().err
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(dict.fromkeys(GROUPS) | {"trainer": {"steps": 10, "epochs": 0}}))
    assert main([f"fork={tmp_path}", "trainer.stepps=3"]) == 2
    assert "There is no key trainer.stepps" in capsys.readouterr().err


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a run."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_other_data_than_it_was_trained_on_are_refused_with_the_fork_that_takes_them(
    configure: Configure, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{number} sheep and {number * 7 % 13} goats. " for number in range(2000)))
    small = ("task.context=16", "model=transformer", "model.width=8", "model.depth=1", "trainer.steps=8", "trainer.batch_size=4")
    folder = tmp_path / "day" / "run"
    run(configure("task=text", f"task.path={text}", *small, f"output={tmp_path}"), folder, quiet=True)
    before = contents(folder)
    text.write_text(text.read_text()[::-1])  # the same characters in another order
    assert main([f"resume={folder}", "trainer.steps=12"]) == 2
    said = capsys.readouterr().err
    assert "The data of task=text are not those that this run was trained on" in said and f"fork={folder}" in said
    assert {name: kept for name, kept in contents(folder).items() if name != "esper.log"} == before
    start = fork(folder, ["trainer.steps=12"])
    assert run(start.config, start.folder, quiet=True, state=start.state).summary["steps"] == 12


@pytest.mark.parametrize(("what", "then", "now"), [("torch", "2.0.1", str(torch.__version__)), ("the processor", "an abacus", processor())])
def test_other_versions_and_processors_are_said_and_stay_in_the_summary(
    finished: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, what: str, then: str, now: str
) -> None:
    folder = copied(finished, tmp_path, until=79)
    start = resume(folder)
    assert start.state["versions"][what] == now
    start.state["versions"][what] = then
    summary = run(start.config, start.folder, quiet=True, state=start.state).summary
    sentence = f"computed by {what} {then}, now {now}"
    assert sentence in caplog.text
    assert [alert["code"] for alert in summary["alerts"] if sentence in alert["text"]] == ["other_versions"]


@pytest.mark.parametrize("words", [["trainer.steps=50"], ["trainer.steps=0", "trainer.epochs=1"], ["trainer.steps=79", "tracking=none"]])
def test_a_run_gets_no_shorter(finished: Path, tmp_path: Path, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    for until in (None, 40):
        folder = copied(finished, tmp_path / str(until), until)
        before = contents(folder)
        assert main([f"resume={folder}", *words]) == 2
        assert "with resume= a run only gets longer" in capsys.readouterr().err
        assert contents(folder) == before


def test_epochs_that_come_to_more_steps_are_longer(finished: Path, tmp_path: Path) -> None:
    assert resume(copied(finished, tmp_path), ["trainer.steps=0", "trainer.epochs=3"]).config.trainer.epochs == 3


def test_the_last_checkpoint_of_a_finished_run_leaves_nothing_to_do(finished: Path, tmp_path: Path) -> None:
    folder = copied(finished, tmp_path)
    with pytest.raises(UserError, match="is finished"):
        resume(disk.checkpoints(folder / disk.FOLDER)[-1])


def test_a_checkpoint_apart_from_its_run_is_refused(finished: Path, tmp_path: Path) -> None:
    checkpoint = disk.checkpoints(finished / disk.FOLDER)[-1]
    for place in (tmp_path / "step", tmp_path / disk.FOLDER / "000000080"):
        shutil.copytree(checkpoint, place)
        for begin in (resume, fork):
            with pytest.raises(UserError, match="is a checkpoint apart from its run"):
                begin(place)


def without(path: Path, change: Any) -> None:
    """Let a state be changed and the checkpoint be written anew, with right hashes."""
    checkpoint, state = disk.read(path)
    plain, tensors = split(change(join(*split(state))))
    manifest = checkpoint.manifest
    disk.write(disk.Copy(checkpoint.step, manifest["tick"], manifest["topology"], plain, tensors, manifest["score"]), path.parent)


FORGERIES = {
    "no controller": lambda state: {key: value for key, value in state.items() if key != "controller"},
    "no alerts": lambda state: {key: value for key, value in state.items() if key != "alerts"},
    "a controller of text": lambda state: {**state, "controller": "{"},
    "alerts of nothing": lambda state: {**state, "alerts": "null"},
    "branches alone": lambda state: {"grow": state["trainer"]["grow"]},
    "a list": lambda state: [state],
    "no versions": lambda state: {**state, "versions": 3},
}


@pytest.mark.parametrize("name", FORGERIES)
def test_a_whole_checkpoint_that_is_not_a_runs_is_refused(
    finished: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copied(finished, tmp_path, until=40)
    without(disk.checkpoints(folder / disk.FOLDER)[-1], FORGERIES[name])
    assert main([f"resume={folder}"]) == 2
    assert "The saved state cannot be taken over" in capsys.readouterr().err


def test_a_broken_summary_is_said_and_no_obstacle_to_auto(
    configure: Configure, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copied(finished, tmp_path)
    config = configure(f"output={tmp_path}")
    for content, said in (("{", "cannot be read"), ("", "cannot be read"), ("[]", "holds no summary")):
        (folder / "summary.json").write_text(content)
        assert main([f"resume={folder}"]) == 2
        assert f"{folder / 'summary.json'} {said}" in capsys.readouterr().err
        assert unfinished(config) is None
        assert f"{folder / 'summary.json'} {said}" in capsys.readouterr().err
    (folder / "summary.json").write_text("{}")
    assert main([f"resume={folder}"]) == 2
    assert "does not say how its run ended" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("word", "why"),
    [
        ("-m", "'-m' is no setting, and a run goes on alone: write key=value, as in trainer.steps=4000; a sweep goes on by its own words"),
        ("--multirun", "'--multirun' is no setting, and a run goes on alone"),
        ("+foo=1", "There is no key foo in this run's configuration, and one that goes on gets no other keys"),
        ("++trainer.foo=1", "There is no key trainer.foo in this run's configuration"),
        ("~trainer.clip", "'~trainer.clip' is no setting, and a run goes on alone"),
        ("optimizer.lrr=0.1", "There is no key optimizer.lrr in this run's configuration"),
        ("optimizer.lr=0.1,0.2", "optimizer.lr=0.1,0.2 gives optimizer.lr several values, and a run goes on alone: give one."),
    ],
)
@pytest.mark.parametrize("key", ["resume", "fork"])
def test_what_no_run_can_go_on_with_is_refused_without_a_hint_that_leads_nowhere(
    finished: Path, capsys: pytest.CaptureFixture[str], key: str, word: str, why: str
) -> None:
    assert main([f"{key}={finished}", word]) == 2
    said = capsys.readouterr().err
    assert why in said and "fork=" not in said and said.count("\n") == 1


def test_a_run_of_before_there_were_flags_goes_on_with_the_share_of_its_kernels(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copied(finished, tmp_path, until=40)
    tree = yaml.safe_load((folder / "config.yaml").read_text())
    flags = tree.pop("flags")
    tree["kernel"]["rollout"] = 0.25
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    start = resume(folder)
    assert start.config.flags.kernels.percent == 25.0 and flags["kernels"]["percent"] == 100.0
    assert start.config.flags.growth.percent == 100.0 and not hasattr(start.config.kernel, "rollout")
    monkeypatch.setenv("ESPER_FLAGS", "kernels=off")
    assert resume(folder).config.flags.kernels.percent == 0.0, "the environment holds for a run that goes on, too"
    tree["kernel"]["rollout"] = "half"
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(UserError, match=r"kernel\.rollout=half"):
        resume(folder)
