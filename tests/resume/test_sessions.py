"""A run names the environment of each of its sessions, so that none is forgotten when two runs are compared."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from esper.checkpoint import disk
from esper.cli.resume import fork, resume
from esper.compare.fingerprint import explain
from esper.errors import UserError
from esper.report.summary_file import read_summary
from esper.running.provenance import FILE, note_session, processor, sessions
from esper.running.run import run
from tests.resume.conftest import copied


def go_on(folder: Path, *words: str) -> None:
    start = resume(folder, words)
    run(start.config, start.folder, quiet=True, state=start.state)


def environments(first: Path, second: Path) -> list[str]:
    return [difference.text for difference in explain(first, second) if difference.kind == "environment"]


@pytest.fixture
def abacus(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Until it is undone, the processor is another one."""
    own = processor()
    monkeypatch.setattr("esper.running.provenance.processor", lambda: f"{own}, an abacus")
    return monkeypatch


def test_a_life_on_another_machine_is_not_forgotten_by_the_last_one(finished: Path, tmp_path: Path, abacus: pytest.MonkeyPatch) -> None:
    folder = copied(finished, tmp_path, until=40)
    at = int(disk.checkpoints(folder / disk.FOLDER)[-1].name)
    go_on(folder)
    abacus.undo()
    go_on(folder, "trainer.steps=90")
    told = read_summary(folder)
    assert told["environment"]["cpu"]["model"] == processor(), "the last life was at home again"
    assert [(life["since"], life["environment"]["cpu"]["model"]) for life in told["environments"]] == [
        (0, processor()), (at, f"{processor()}, an abacus"), (80, processor()),
    ]  # fmt: skip
    assert environments(finished, folder) == [f"cpu.model is {processor()} and {processor()}, an abacus from step {at} on"]


def test_the_same_machine_makes_one_entry_however_often_it_goes_on(finished: Path, tmp_path: Path) -> None:
    folder = copied(finished, tmp_path, until=40)
    go_on(folder)
    go_on(folder, "trainer.steps=90")
    assert [life["since"] for life in read_summary(folder)["environments"]] == [0] and environments(finished, folder) == []


def test_what_was_done_again_elsewhere_counts_for_who_did_it_last(finished: Path, tmp_path: Path, abacus: pytest.MonkeyPatch) -> None:
    folder = copied(finished, tmp_path, until=40)
    go_on(folder)
    abacus.undo()
    go_on(disk.checkpoints(folder / disk.FOLDER)[0])
    assert [life["since"] for life in read_summary(folder)["environments"]] == [0] and environments(finished, folder) == []


def test_a_life_of_before_there_was_the_file_is_told_by_its_summary_or_counts_as_not_recorded(finished: Path, tmp_path: Path) -> None:
    for number, gone in enumerate(([FILE], [FILE, "summary.json"])):
        folder = copied(finished, tmp_path / str(number), until=40)
        for name in gone:
            (folder / name).unlink()
        note_session(folder, 40, {"cpu": "an abacus"})
        before = read_summary(finished)["environment"] if number == 0 else None
        assert sessions(folder) == [{"since": 0, "environment": before}, {"since": 40, "environment": {"cpu": "an abacus"}}]
    go_on(folder)
    assert "what computed one of the runs, or both, was not recorded" in environments(finished, folder)


def test_a_fork_has_lives_of_its_own_alone_and_a_damaged_file_is_refused(finished: Path, tmp_path: Path) -> None:
    start = fork(copied(finished, tmp_path), ["trainer.steps=90"])
    run(start.config, start.folder, quiet=True, state=start.state)
    assert [life["since"] for life in read_summary(start.folder)["environments"]] == [80]
    (start.folder / FILE).write_text("[{")
    with pytest.raises(UserError, match=f"{start.folder / FILE} cannot be read .*delete it"):
        go_on(start.folder, "trainer.steps=95")


def test_a_run_that_begins_anew_in_a_folder_forgets_who_was_there(tmp_path: Path) -> None:
    note_session(tmp_path, 0, {"cpu": "a"})
    note_session(tmp_path, 0, {"cpu": "b"})
    assert json.loads((tmp_path / FILE).read_text()) == [{"since": 0, "environment": {"cpu": "b"}}]
