"""``esper watch`` as a user calls it, beside runs that are under way."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from esper.app import main
from esper.running.run_folder import status

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(processes: None, whole_runs: None, checkout: Path) -> Iterator[Start]:
    """Starts ``esper`` in the background."""
    running: list[subprocess.Popen[str]] = []

    def begin(*words: str, **streams: int) -> subprocess.Popen[str]:
        environment = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        command = [sys.executable, "-m", "esper", *words]
        running.append(
            subprocess.Popen(
                command,
                env=environment,
                text=True,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores it
                **(streams or {"stderr": subprocess.DEVNULL, "stdout": subprocess.DEVNULL}),
            )
        )
        return running[-1]

    yield begin
    for process in running:
        process.kill()
        process.wait()


def wait_for(true: Callable[[], object], process: subprocess.Popen[str]) -> None:
    while not true():
        assert process.poll() is None, "the run ended too soon"
        time.sleep(0.05)


SHORT = ("trainer.steps=400", "trainer.control=false", "tracking=none", "trainer.validate_every=10%")


@pytest.mark.parametrize("bus", ["memory", "embedded"])
def test_a_run_under_way_is_followed_to_its_end(start: Start, tmp_path: Path, bus: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "day" / "run"
    process = start(*SHORT, f"bus={bus}", f"output={tmp_path}", f"hydra.run.dir={folder}")
    wait_for(lambda: folder.exists() and status(folder) == "RUNNING", process)
    if bus == "embedded":
        wait_for((folder / "bus" / "join.json").exists, process)
    assert main(["watch", f"output={tmp_path}"]) == 0
    said = capsys.readouterr().out
    assert "dormant → germinated" in said and said.splitlines()[-1].startswith("FINISHED 400/400 · train loss ")
    assert process.wait(60) == 0


def test_ctrl_c_ends_the_page_and_leaves_the_run_alone(start: Start, tmp_path: Path) -> None:
    folder = tmp_path / "day" / "run"
    run = start("trainer.steps=100000", *SHORT[1:], f"output={tmp_path}", f"hydra.run.dir={folder}")
    wait_for(lambda: folder.exists() and status(folder) == "RUNNING", run)
    page = start("watch", str(folder), "--web", stderr=subprocess.PIPE)
    assert page.stderr is not None
    url = page.stderr.readline().split()[2]
    with urllib.request.urlopen(f"{url}state.json") as answer:
        assert b'"kind": "run"' in answer.read()
    page.send_signal(signal.SIGINT)
    assert page.wait(30) == 0 and page.stderr.read() == ""
    assert run.poll() is None


@pytest.mark.slow
def test_what_cannot_be_watched_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tmp_path.joinpath("a").mkdir()
    for words, said in (
        ([f"output={tmp_path}"], "Nothing is under way in"),
        (["port=80"], "add --web"),
        (["--web", "port=x"], "port=x is not accepted"),
        (["tls_ca=x"], "give its address, url=rediss://…"),
        (["run", "url=redis://127.0.0.1:1/0"], "127.0.0.1:1"),
        (["--wbe"], "'--wbe' is no option of esper watch"),
    ):
        assert main(["watch", *words]) == 2
        assert said in capsys.readouterr().err
