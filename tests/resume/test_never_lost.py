"""``resume=auto`` finds every run that did not come to its end, whatever ended it; and no run takes the place of another."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from esper.app import main
from esper.cli.compose import compose
from esper.compare.sweep.resume import NOTE
from esper.compare.sweep.resume import sweep_lock as sweeping
from esper.errors import UserError
from esper.report.summary_file import read_summary
from esper.running import connections, ending
from esper.running.resume import unfinished
from esper.running.run import run
from esper.running.run_folder import LOCK, hold_folder, status
from tests.resume import killing
from tests.resume.conftest import SHORT, Configure, copied
from tests.resume.test_refusals import contents


def folders(output: Path) -> list[Path]:
    """Those that runs have, or had, under an output folder."""
    return sorted(path for path in output.glob("*/*") if path.is_dir())


def at_once(number: int) -> Callable[..., None]:
    """In place of what a run does first once it has its folder: its process gets a signal."""
    return lambda *_: os.kill(os.getpid(), number)


def test_a_killed_run_whose_next_lives_fail_early_is_still_found_and_ends_the_same(
    configure: Configure, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    folder, log = tmp_path / "day" / "run", tmp_path / "log"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    words = [f"output={tmp_path}", f"bus.metrics_port={port}"]
    config, auto = configure(*words), [*SHORT, *words, "resume=auto"]
    folder.mkdir(parents=True)
    assert killing.child(lambda: killing.start(config, folder), log, kill_when=killing.reached(folder, 28)).code == -9
    with socket.create_server(("127.0.0.1", port)):
        assert main(auto) == 2
        assert f"going on in {folder}" in (said := capfd.readouterr().err) and f"bus.metrics_port={port} cannot be served" in said
        with pytest.raises(UserError, match="cannot be served"):
            run(config, tmp_path / "day" / "anew", quiet=True)
    assert status(tmp_path / "day" / "anew") == "NEW", "there was nothing yet that could be lost"
    assert unfinished(config) == folder, "after the port was taken"
    for number, code in ((signal.SIGTERM, 143), (signal.SIGKILL, -9)):
        with monkeypatch.context() as patch:
            patch.setattr(connections, "describe_run", at_once(number))
            assert killing.child(lambda: os._exit(main(auto)), log).code == code
        assert unfinished(config) == folder, f"after {signal.Signals(number).name}"
    there = folders(tmp_path)
    assert main(auto) == 0
    assert folders(tmp_path) == there, "going on makes no other folder"
    assert [text for text in killing.differences(folder, finished) if "config_hash" not in text] == []
    assert unfinished(config) is None and not (folder / LOCK).exists()


def test_a_run_that_ended_on_a_disk_without_room_is_found(configure: Configure, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The system lets no file of the process grow beyond what a checkpoint takes, as a quota does."""
    config, folder, log = configure(f"output={tmp_path}"), tmp_path / "day" / "run", tmp_path / "log"

    def cramped() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (70_000, 70_000))
        os._exit(main([*SHORT, f"output={tmp_path}", f"hydra.run.dir={folder}"]))

    assert killing.child(cramped, log).code == 1
    said = capfd.readouterr().err
    assert "file too large; raise the limit" in said.splitlines()[-1] and "Traceback" not in said
    assert read_summary(folder)["status"] == "FAILED" and unfinished(config) == folder
    assert main([*SHORT, f"output={tmp_path}", "resume=auto"]) == 0
    assert read_summary(folder)["status"] == "FINISHED" and folders(tmp_path) == [folder]


def test_a_run_that_could_not_even_write_its_summary_is_found(
    configure: Configure, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, config = copied(finished, tmp_path), configure(f"output={tmp_path}")
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(ending, "write_summary", full)
        run(config, folder, quiet=True)
    assert unfinished(config) == folder


def test_beside_a_live_run_of_the_same_configuration_none_is_begun_without_saying_so(
    configure: Configure, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, config = tmp_path / "day" / "run", configure(f"output={tmp_path}")
    folder.mkdir(parents=True)
    with hold_folder(config, folder):  # one that only just begins
        assert main([*SHORT, f"output={tmp_path}", "resume=auto"]) == 2
        assert f"A run of this very configuration is under way in {folder}: wait for it, or end it first." in capsys.readouterr().err
        assert unfinished(configure(f"output={tmp_path}", "seed=1")) is None
    assert folders(tmp_path) == [folder] and status(folder) == "NEW"


def test_auto_looks_into_a_folder_that_is_named_too(configure: Configure, finished: Path, tmp_path: Path) -> None:
    folder = copied(finished, tmp_path, until=40)
    words = [f"output={tmp_path / 'elsewhere'}", "resume=auto", f"hydra.run.dir={folder}"]
    assert unfinished(compose([*SHORT, *words])) is None
    assert main([*SHORT, *words]) == 0
    assert read_summary(folder)["steps"] == 80 and read_summary(folder)["status"] == "FINISHED"


@pytest.mark.parametrize(
    ("until", "sentence"),
    [
        (None, "holds a finished run, and no run takes the place of another: esper resume={} trainer.steps=<more steps> trains it longer"),
        (40, "holds a run that did not come to its end, and no run takes the place of another: esper resume={} goes on with it"),
    ],
)
def test_nothing_is_written_over_a_run(
    configure: Configure, finished: Path, tmp_path: Path, until: int | None, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, output = copied(finished, tmp_path, until), f"output={tmp_path}"
    before = contents(folder)
    named = [output, f"hydra.run.dir={folder}"]
    for words in ([*SHORT, *named], [*SHORT, *named, "seed=1"], [*SHORT, *named, "seed=1", "resume=auto"]):
        assert main(words) == 2
        said = capsys.readouterr().err
        assert sentence.format(folder) in said and "To replace it, delete that folder first." in said
    assert main([*SHORT, output, "-m", "seed=0,1", f"hydra.sweep.dir={folder}"]) == 2
    with pytest.raises(UserError, match="takes the place of another"):
        run(configure(output), folder, quiet=True)
    assert contents(folder) == before and folders(tmp_path) == [folder]


def test_nothing_is_changed_in_the_folder_of_what_is_running(
    configure: Configure, finished: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder, output = copied(finished, tmp_path, until=40), f"output={tmp_path}"
    (folder / NOTE).write_text('{"command": []}')
    before = contents(folder)
    with hold_folder(configure(output), folder):
        for words in ([*SHORT, output, f"hydra.run.dir={folder}"], [f"resume={folder}"], [f"resume={folder}", "trainer.steps=90"]):
            assert main(words) == 2
            assert f"Another process is running in {folder}; wait for it, or end it first." in capfd.readouterr().err
        assert contents(folder) == before

    with sweeping(folder):
        begun = killing.child(lambda: os._exit(main([*SHORT, "-m", "seed=0,1", f"hydra.sweep.dir={folder}"])), tmp_path / "log")
    assert begun.code == 2 and "is running in another process" in capfd.readouterr().err
    assert {name: kept for name, kept in contents(folder).items() if name != "sweep.lock"} == before
