"""A sweep whose process was killed goes on: what is done is skipped, what was interrupted goes on from its newest checkpoint."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from esper.cli.compose import compose
from esper.compare.sweep.resume import sweep_lock, sweep_to_resume
from esper.report.summary_file import read_summary
from esper.running.run import run
from tests.resume.killing import differences

pytestmark = pytest.mark.e2e
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "120"}
STEPS = 500  # long enough not to be over when a busy machine comes to kill it
SWEEP = (
    "-m",
    "seed=0,1",
    f"trainer.steps={STEPS}",
    "trainer.checkpoint_every=2%",
    "trainer.control=false",
    "telemetry.every=5",
    "tracking=csv",
    "controller=random",
    "controller.earliest=5%",
    "controller.latest=40%",
    "hydra.launcher.workers=1",
)


def begin(*words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "esper", *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENVIRONMENT
    )


def until(happened: Callable[[], object], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not happened():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.01)


def jobs(folder: Path) -> list[Path]:
    """The jobs' folders, by depth: a walk through everything would meet checkpoints being renamed and retired."""
    return sorted(path.parent for path in folder.glob("sweeps/*/*/*/job.log"))


def test_killed_and_started_again_with_resume_auto_it_ends_as_an_undisturbed_one(tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    one = [word for word in SWEEP[2:] if not word.startswith("hydra.")]
    process = begin(*SWEEP, f"output={cut}")
    until(lambda: len(jobs(cut)) == 2 and len(list((jobs(cut)[1] / "checkpoints").glob("[0-9]*"))) > 1, process)
    process.kill()
    process.wait()
    first, second = jobs(cut)
    assert read_summary(first)["status"] == "FINISHED"
    written = (first / "summary.json").stat().st_mtime_ns
    again = begin(*SWEEP, f"output={cut}", "resume=auto")
    said = again.communicate(timeout=120)[0]
    assert again.returncode == 0, said
    assert f"Going on with the sweep in {first.parent}" in said and " seed=0" not in said
    assert "seed=1 goes on from its newest checkpoint" in said
    log = (second / "job.log").read_text()
    step = int(log.split("going on after step ")[1].split()[0])
    assert 0 < step < STEPS
    assert (first / "summary.json").stat().st_mtime_ns == written
    assert len(jobs(cut)) == 2, "nothing was set aside, and no second sweep was begun"
    run(compose([*one, "seed=1", "tracking.figures=false", f"output={tmp_path}"]), whole, quiet=True)
    assert [text for text in differences(second, whole) if not text.startswith("summary run:")] == []


def test_stopped_by_a_scheduler_it_ends_with_75_is_queued_again_and_goes_on(tmp_path: Path, checkout: Path) -> None:
    """The recipe of the documentation, with a SLURM that only notes what it is asked."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, line in (("esper", f'exec {sys.executable} -m esper "$@"'), ("scontrol", f'echo "$@" >> {tmp_path}/asked')):
        (commands / name).write_text(f"#!/bin/sh\n{line}\n")
        (commands / name).chmod(0o755)
    environment = ENVIRONMENT | {"PATH": f"{commands}:{os.environ['PATH']}", "SLURM_JOB_ID": "17", "PYTHONPATH": str(checkout)}
    command = ["bash", str(checkout / "docs" / "examples" / "requeue.sh"), *SWEEP, f"output={tmp_path}"]

    def queued() -> subprocess.Popen[str]:
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)

    process = queued()
    until(lambda: jobs(tmp_path) and any((jobs(tmp_path)[0] / "checkpoints").glob("[0-9]*")), process)
    process.send_signal(signal.SIGTERM)  # as SLURM does: to the shell alone
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 75, said
    assert "esper: ended by SIGTERM, everything is saved: esper -m seed=0,1 " in said
    assert (tmp_path / "asked").read_text() == "requeue 17\n"
    done = read_summary(jobs(tmp_path)[0])
    assert done["status"] == "KILLED" and 0 < done["steps"] < STEPS
    process = queued()
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 0, said
    assert "seed=0 goes on from its newest checkpoint" in said
    assert f"going on after step {done['steps']}\n" in (jobs(tmp_path)[0] / "job.log").read_text()
    assert [read_summary(job)["status"] for job in jobs(tmp_path)] == ["FINISHED", "FINISHED"]
    assert (tmp_path / "asked").read_text() == "requeue 17\n"


def test_a_stopped_sweep_whose_jobs_saved_nothing_ends_with_143(tmp_path: Path) -> None:
    process = begin(*SWEEP, "trainer.steps=20000", "trainer.checkpoint_every=", f"output={tmp_path}")
    until(lambda: jobs(tmp_path) and (jobs(tmp_path)[0] / "metrics.csv").exists(), process)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 143, said
    assert "Stopped; what is done is kept. Go on with:" in said and "esper: ended by SIGTERM\n" in said


def test_only_a_sweep_of_the_same_words_that_did_not_end_and_runs_nowhere_is_taken_up(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["-m", "seed=0,1", "grafting=drift"]
    for number, note in enumerate(({"command": words}, {"command": [*words, "seed=2"]}, {"command": words, "ended": True})):
        (tmp_path / "sweeps" / str(number)).mkdir(parents=True)
        (tmp_path / "sweeps" / str(number) / "sweep.json").write_text(json.dumps(note))
    new = tmp_path / "sweeps" / "new"
    new.mkdir()
    (new / "multirun.yaml").write_text("")
    with sweep_lock(tmp_path / "sweeps" / "0"):
        probe = "import sys; from pathlib import Path; from esper.compare.sweep import resume; a = Path(sys.argv[1]) / 'sweeps'\n"
        same = "a / 'new', ['-m', 'seed=0,1', 'grafting=drift', 'resume=auto'], a.parent"
        asks = {
            f"resume.sweep_to_resume({same})": "A sweep of these very words is under way",
            "resume.sweep_lock(a / '0').__enter__()": "is running in another process",
            "resume.refuse_taken_folder(a / '0')": "is running in another process",
        }
        for ask, sentence in asks.items():
            refused = subprocess.run([sys.executable, "-c", probe + ask, str(tmp_path)], capture_output=True, text=True, check=False)
            assert refused.returncode == 1 and sentence in refused.stderr
        assert not new.exists(), "what Hydra had made for it is gone"
    new.mkdir()
    (new / "multirun.yaml").write_text("")
    assert sweep_to_resume(new, [*words, "resume=auto"], tmp_path) == tmp_path / "sweeps" / "0"
    assert not new.exists()
    assert sweep_to_resume(new, ["-m", "seed=7"], tmp_path) == new
    (tmp_path / "sweeps" / "0" / "sweep.json").write_text("")
    assert sweep_to_resume(new, words, tmp_path) == new
    assert f"{tmp_path / 'sweeps' / '0' / 'sweep.json'} cannot be read" in capsys.readouterr().err
