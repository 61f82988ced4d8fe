"""What a person sees of a sweep's jobs while they run."""

from __future__ import annotations

from io import StringIO

import pytest
from rich.console import Console

from esper.compare.sweep.arms import Job
from esper.compare.sweep.progress import Progress

LINEAR, DRIFT, TUNING = ([Job(first + i, (), arm, "", i) for i in range(3)] for first, arm in ((0, "linear"), (3, "drift"), (6, "linear")))
ROWS = {"linear, tuning": TUNING, "linear": LINEAR, "drift": DRIFT}


def seen(progress: Progress) -> dict[str, list[str]]:
    """The table's rows: done, running, waiting, failed, kept by name."""
    console = Console(file=StringIO(), width=100)
    console.print(progress.table())
    lines = [line.strip("│ ").split("│") for line in console.file.getvalue().splitlines() if line.startswith("│")]  # type: ignore[attr-defined]
    return {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in lines}


def test_the_table_counts_every_job_once_in_its_row_and_state() -> None:
    progress = Progress(ROWS, Console(file=StringIO()))
    assert seen(progress) == {name: ["0", "0", "3", "0", "0"] for name in ROWS}
    progress.kept(LINEAR[0], "kept")
    progress.kept(DRIFT[0], "failed")
    for job in (LINEAR[1], DRIFT[1], DRIFT[2], TUNING[0]):
        progress.started(job)
    progress.finished(LINEAR[1], 1.5, "", "log")
    progress.finished(DRIFT[1], 1.5, "it broke", "log")
    assert seen(progress) == {
        "linear, tuning": ["0", "1", "2", "0", "0"],
        "linear": ["1", "0", "1", "0", "1"],
        "drift": ["0", "1", "0", "2", "0"],
    }


def test_the_title_counts_what_this_start_has_to_do_and_foretells_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("esper.compare.sweep.progress.time.monotonic", lambda: now[0])
    progress = Progress({"linear": LINEAR, "drift": DRIFT}, Console(file=StringIO()))
    progress.kept(LINEAR[0], "kept")
    assert progress.table().title == "0 of 5 jobs"
    now[0] = 120.0
    for job in (LINEAR[1], DRIFT[0]):
        progress.started(job)
        progress.finished(job, 1.0, "", "log")
    assert progress.table().title == "2 of 5 jobs, about 30 s left"


def test_elsewhere_than_in_a_terminal_every_end_is_a_line_and_a_failure_names_its_log() -> None:
    console = Console(file=StringIO(), width=200)
    with Progress({"linear": LINEAR}, console) as progress:
        progress.finished(LINEAR[0], 1.234, "", "ours.log")
        assert console.file.getvalue() == "1/3 linear seed=0 done in 1.2 s\n"  # type: ignore[attr-defined]
        progress.finished(LINEAR[1], 1.0, "optimizer.lr=[1] is too large", "ours.log")
    said = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert said[1:] == ["failed linear seed=1: optimizer.lr=[1] is too large; its log is ours.log"]


def test_in_a_terminal_the_table_is_drawn_in_place_and_failures_stand_above_it() -> None:
    console = Console(file=StringIO(), width=100, force_terminal=True, color_system=None)
    with Progress({"linear": LINEAR}, console) as progress:
        progress.started(LINEAR[0])
        progress.finished(LINEAR[0], 1.0, "", "ours.log")
        progress.finished(LINEAR[1], 1.0, "it broke", "ours.log")
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert " done in " not in said
    assert "failed linear seed=1: it broke; its log is ours.log" in said
    row = next(line for line in said[said.rindex("2 of 3 jobs") :].splitlines() if "linear" in line)
    assert [word for word in row.split() if word.isdigit()] == ["1", "0", "1", "1", "0"]
