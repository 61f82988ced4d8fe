"""A mistake that needs no torch is answered without it: importing it takes longer than everything else about an answer."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import esper
from esper.app import main
from esper.cli import machine
from esper.errors import UserError

#: Answers in a fresh interpreter, and says on stdout whether torch was imported for it.
PROGRAM = """
import sys
from esper.app import main
from esper.cli import machine
machine.TRACES = ()
for words in {many!r}:
    code = main(words)
    print(code, "torch" in sys.modules)
"""
MISTAKES = [
    ["trainer.control=perhaps"],
    ["trainer.validate_every=often"],
    ["kernel=triton"],
    ["kernel=triton", "trainer.device=cpu"],
    ["trainer.device=cuda"],
    ["trainer.precision=fp16"],
    ["optimizer.lr=fast"],
    ["scheduler=cosine", "scheduler.warmup=2"],
    ["lifecycle.training_min=5"],
    ["telemetry.every=0"],
    ["sites.per_site=none"],
    ["controller.until=late"],
    ["bus.memory_mb=0"],
    ["tracking.points=1"],
    ["compare.alpha=3"],
    ["seed=-1"],
    ["modell=mlp"],
    ["check", "trainer.steps=-1"],
    ["-m", "seed=0,1", "trainer.batch_size=0"],
    ["-m", "seed=0,1", "trainer.device=cuda"],
    ["hydra.job.chdir=true"],
    ["tracking.uri=http://me:secret@host"],
    ["model.width=0"],
    ["task.judge=few"],
    ["blueprint.hidden=0"],
    ["grafting.ramp=slow"],
]


@pytest.mark.usefixtures("processes")
def test_mistakes_are_answered_without_torch(tmp_path: Path, checkout: Path) -> None:
    """One process for all of them: what the first imported, the next would be seen with."""
    environment = {"PYTHONPATH": str(checkout), "PATH": "/usr/bin:/bin"}
    command = [sys.executable, "-c", PROGRAM.format(many=MISTAKES)]
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines() == ["2 False"] * len(MISTAKES), list(zip(MISTAKES, ended.stdout.splitlines(), strict=False))
    assert len(ended.stderr.splitlines()) == len(MISTAKES) and not any(tmp_path.iterdir())


def test_a_launcher_that_may_send_jobs_elsewhere_is_not_asked_for_a_gpu_here(monkeypatch: pytest.MonkeyPatch) -> None:
    from omegaconf import OmegaConf

    monkeypatch.setattr(machine, "TRACES", ())
    wants_gpu = OmegaConf.create({"trainer": {"device": "cuda"}, "kernel": {"name": "triton"}})
    with pytest.raises(UserError):
        machine.refuse_impossible(wants_gpu, here=True)
    machine.refuse_impossible(wants_gpu, here=False)


@pytest.mark.parametrize("words", [["--version"], ["seed=1", "--version"]])
def test_the_version_is_told(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 0
    assert capsys.readouterr().out == f"esper {esper.__version__}\n"


@pytest.mark.slow
def test_hydras_help_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--hydra-help"]) == 0
    assert "--shell-completion" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("esper model=", ["model=mlp", "model=cnn", "model=transformer"]),
        ("esper check trainer.st", ["trainer.steps="]),
        ("esper compare ", ["optimizer="]),
        ("esper 'half", []),
    ],
)
def test_a_shell_completes_groups_options_and_keys(
    line: str, offered: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COMP_LINE", line)
    code = main(["-sc", "query=bash"])
    printed = capsys.readouterr()
    assert set(offered) <= set(printed.out.split()) and printed.err == ""
    assert code == 0 or not offered


def test_completion_is_installed_for_this_program(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--shell-completion", "install=bash"]) == 0
    assert capsys.readouterr().out.rstrip().endswith("hydra_bash_completion esper")
