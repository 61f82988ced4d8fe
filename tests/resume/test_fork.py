"""A fork begins with a run's state and other settings; what those settings have no use for begins anew, and is said."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from esper.checkpoint import disk
from esper.cli.resume import fork
from esper.errors import UserError
from esper.report.summary_file import read_summary
from esper.running.run import run
from tests.resume.conftest import Configure, copied


def test_a_fork_is_a_new_run_with_other_settings_from_that_state(finished: Path, tmp_path: Path) -> None:
    folder = copied(finished, tmp_path, until=79)
    start = fork(folder, ["optimizer.lr=1e-4", "grafting=drift", "tags=[forked]"])
    assert start.folder != folder and tmp_path in start.folder.parents
    assert (start.config.optimizer.lr, start.config.grafting.name, start.config.tags) == (1e-4, "drift", ["forked"])
    result = run(start.config, start.folder, quiet=True, state=start.state)
    assert result.summary["steps"] == 80 and result.summary["fingerprint"] != read_summary(finished)["fingerprint"]


SCRIPT = "controller.script=[{at: 50%, command: germinate, count: 1}]"
PAIRS = {
    "sgd to adamw": (("optimizer=sgd",), ("optimizer=adamw",), "optimizer=adamw begins without what sgd had gathered"),
    "adamw to sgd": ((), ("optimizer=sgd",), "optimizer=sgd begins without what adamw had gathered"),
    "adamw to muon": ((), ("optimizer=muon",), "optimizer=muon begins without what adamw had gathered"),
    "muon to adamw": (("optimizer=muon",), ("optimizer=adamw",), "optimizer=adamw begins without what muon had gathered"),
    "heuristic to random": (("controller=heuristic",), ("controller=random",), "controller=random begins without the memory of heuristic"),
    "random to heuristic": ((), ("controller=heuristic",), "controller=heuristic begins without the memory of random"),
    "none to scheduled": (
        ("controller=none",),
        ("controller=scheduled", SCRIPT),
        "controller=scheduled begins without the memory of none",
    ),
    "random to none": ((), ("controller=none",), "controller=none begins without the memory of random"),
}


@pytest.mark.parametrize(("before", "after", "said"), PAIRS.values(), ids=PAIRS.keys())
def test_another_kind_of_optimizer_or_controller_begins_anew(
    configure: Configure, tmp_path: Path, capsys: pytest.CaptureFixture[str], before: tuple[str, ...], after: tuple[str, ...], said: str
) -> None:
    folder = tmp_path / "day" / "run"
    run(configure(*before, f"output={tmp_path}", "trainer.steps=40"), folder, quiet=True)
    start = fork(folder, [*after, "trainer.steps=60"])
    assert capsys.readouterr().err == f"esper: {said}\n"
    result = run(start.config, start.folder, quiet=True, state=start.state)
    assert result.summary["steps"] == 60 and result.summary["status"] == "FINISHED"
    assert not result.summary["refusals"], "it knows which seeds are taken"


def test_an_optimizer_that_begins_anew_is_the_one_of_a_rollback_too(finished: Path, tmp_path: Path) -> None:
    states = [disk.read(path) for path in disk.checkpoints(finished / disk.FOLDER)]
    step = max(checkpoint.step for checkpoint, state in states if state["trainer"]["grow"]["guard"]["states"])
    place = copied(finished, tmp_path) / disk.FOLDER / f"{step:09d}"
    state = fork(place, ["optimizer=sgd"]).state["trainer"]
    snapshots = [state["governor"]["snapshot"], *(kept["snapshot"] for kept in state["grow"]["guard"]["states"])]
    for holder in (state, *snapshots):
        assert holder["optimizer"] and all(memory == {} for memory in holder["optimizer"])
    banks = state["grow"]["garden"]["banks"]
    assert any(bank["steps"].any() for site in banks.values() for bank in site.values()), "branches learn by AdamW all the same"
    kept = fork(place, ["optimizer.lr=1e-4"]).state["trainer"]
    assert all(isinstance(memory["exp_avg"], torch.Tensor) for memory in kept["optimizer"])


def test_branches_that_learn_by_another_rule_begin_anew_too(finished: Path, tmp_path: Path) -> None:
    states = [disk.read(path) for path in disk.checkpoints(finished / disk.FOLDER)]
    step = max(checkpoint.step for checkpoint, state in states if state["trainer"]["grow"]["guard"]["states"])
    state = fork(copied(finished, tmp_path) / disk.FOLDER / f"{step:09d}", ["optimizer=muon"]).state["trainer"]
    for site in state["grow"]["garden"]["banks"].values():
        for bank in site.values():
            moments = [moment for pair in bank["moments"].values() for moment in pair]
            assert not bank["steps"].any() and not any(moment.any() for moment in moments)
            assert any(stack.any() for stack in bank["stacks"].values())
    for kept in state["grow"]["guard"]["states"]:
        for branch in kept["snapshot"]["branches"].values():
            assert not any(moment.any() for row in branch["rows"].values() for moment in row[1:])


def test_a_fork_with_nothing_left_to_train_is_refused(finished: Path, tmp_path: Path) -> None:
    folder = copied(finished, tmp_path)
    for words in (["optimizer.lr=1e-4"], ["trainer.steps=50"], ["trainer.steps=0", "trainer.epochs=1"]):
        with pytest.raises(UserError, match=r"step 80, and the fork would end at step \d+.*trainer.steps=<more than 80>"):
            fork(folder, words)
