"""What a run writes down about itself, and how it ends when it cannot go on."""

from __future__ import annotations

import csv
import hashlib
import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from esper.cli.compose import compose
from esper.errors import UserError
from esper.running import builders, control_runs
from esper.running.provenance import environment, git_state
from esper.running.run import run

pytestmark = pytest.mark.usefixtures("whole_runs")

BRIEF = ["trainer.steps=40", "trainer.control=false", "trainer.validate_every=50%"]


def config(tmp_path: Path, *words: str) -> Any:
    return compose([*BRIEF, "tracking=none", f"output={tmp_path}", *words])


def test_a_run_leaves_its_summary(tmp_path: Path):
    result = run(config(tmp_path, "seed=5"), tmp_path / "run", quiet=True)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "FINISHED" and summary["steps"] == 40 and summary["seed"] == 5
    assert result.primary == summary["metrics"]["final"]["validation/accuracy"]
    assert {"test/accuracy", "test/loss", "validation/loss"} <= summary["metrics"]["final"].keys()
    assert len(summary["fingerprint"]) == 64 and len(summary["config_hash"]) == 64
    assert summary["environment"]["packages"]["torch"] == torch.__version__
    assert summary["macs"] > 0 and summary["seconds"]["total"] > 0.0
    assert torch.are_deterministic_algorithms_enabled() is False, "the process is left as it was"


@pytest.mark.parametrize("deterministic", [True, False])
def test_what_need_not_repeat_is_said_in_summary_and_report(tmp_path: Path, deterministic: bool, capsys: pytest.CaptureFixture[str]):
    words = [] if deterministic else ["trainer.deterministic=false"]
    run(config(tmp_path, *words), tmp_path / "run")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["environment"]["deterministic"] is deterministic
    assert ("trainer.deterministic=false" in capsys.readouterr().out) is not deterministic


def test_a_checkpoint_that_is_skipped_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO):
        run(config(tmp_path, "trainer.checkpoint_every=1step", "trainer.checkpoint_keep=40"), tmp_path / "run", quiet=True)
    said = [record.getMessage() for record in caplog.records if "checkpoint" in record.getMessage()]
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) < 40
    assert len(said) == 1 and "trainer.checkpoint_every" in said[0]


def test_a_run_says_every_metric_once_a_tick(tmp_path: Path):
    run(config(tmp_path, "tracking=csv", "tracking.figures=false"), tmp_path / "run", quiet=True)
    with (tmp_path / "run" / "metrics.csv").open(newline="") as file:
        said = Counter((row["tick"], row["name"]) for row in csv.DictReader(file))
    assert {name for _, name in said} >= {"train/loss", "validation/loss", "cost/macs", "cost/seconds"}
    assert ("40", "train/loss") in said and ("40", "validation/loss") in said, "a step at which both are due"
    assert set(said.values()) == {1}


def test_a_run_that_fails_says_failed_and_keeps_what_it_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("esper.trainer.trainer.Trainer._step", _broken_after(12))
    with pytest.raises(RuntimeError, match="the disk is on fire"):
        run(config(tmp_path, "tracking=csv"), tmp_path / "run", quiet=True)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "FAILED" and summary["steps"] == 12
    assert (tmp_path / "run" / "transitions.parquet").exists()


def _broken_after(steps: int) -> Any:
    from esper.trainer.trainer import Trainer

    ordinary = Trainer._step

    def step(self: Trainer, number: int, *rest: Any) -> Any:
        if number == steps:
            raise RuntimeError("the disk is on fire")
        return ordinary(self, number, *rest)

    return step


def test_a_run_that_cannot_begin_is_refused_and_leaves_nothing_running(tmp_path: Path):
    import threading

    before = threading.active_count()
    with pytest.raises(UserError, match=r"No module of the host matches sites.match 'nowhere'"):
        run(config(tmp_path, "sites.match=[nowhere]", "tracking=csv"), tmp_path / "run", quiet=True)
    assert threading.active_count() <= before  # an earlier test's may have ended meanwhile


def test_a_loss_that_is_not_finite_stops_the_run_with_advice(tmp_path: Path):
    with pytest.raises(UserError, match=r"(rolled back|training loss is nan).*optimizer\.lr"):
        run(config(tmp_path, "optimizer=sgd", "optimizer.lr=1e30", "trainer.clip=0"), tmp_path / "run", quiet=True)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "FAILED"


def test_the_control_is_made_once_and_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    words = ["trainer.control=true", "controller=scheduled", "controller.script=[{at: 2step, command: germinate, seeds: [0]}]"]
    made: list[int] = []
    build = builders.build_trainer

    def counting(*arguments: Any, **settings: Any) -> Any:
        made.append(1)
        return build(*arguments, **settings)

    monkeypatch.setattr(builders, "build_trainer", counting)
    first, second = (run(config(tmp_path, *words), tmp_path / name, quiet=True).summary for name in ("a", "b"))
    assert len(made) == 2 and first["control"] == second["control"]
    assert set(first["control"]) == {"same_steps", "same_macs"}
    kept = [json.loads(path.read_text()) for path in (tmp_path / "controls").glob("*.json")]
    assert len(kept) == 2 and min(one["steps"] for one in kept) == 40
    assert max(one["steps"] for one in kept) > 40, "growing cost something, so the host alone gets more steps"
    assert not list((tmp_path / "controls").glob("*.tmp"))


def test_equal_macs_are_equal_macs():
    assert control_runs.equal_macs_steps(3000, {"macs": 100, "steps": 10}) == 300
    assert control_runs.equal_macs_steps(1, {"macs": 100, "steps": 10}) == 1


def test_the_environment_is_told(monkeypatch: pytest.MonkeyPatch):
    told = environment(torch.device("cpu"))
    assert told["device"] == "cpu" and told["gpu"] == "" and told["threads"] >= 1
    assert "" not in (told["python"], told["system"], told["esper"], told["cpu"]["model"], told["cpu"]["capability"])
    assert {"msgspec", "pyarrow", "safetensors"} <= told["packages"].keys()
    assert told["constraints"] == hashlib.sha256((Path(__file__).parents[2] / "constraints.txt").read_bytes()).hexdigest()
    monkeypatch.setenv("MKL_CBWR", "COMPATIBLE")
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)
    variables = environment(torch.device("cpu"))["variables"]
    assert variables["MKL_CBWR"] == "COMPATIBLE" and "ATEN_CPU_CAPABILITY" not in variables
    assert len(git_state()["commit"]) in (0, 40)
    monkeypatch.setenv("PATH", "")
    assert git_state.__wrapped__() == {"commit": "", "changed": False}
    monkeypatch.setattr("esper.running.provenance.PACKAGES", ("no-such-package",))
    assert environment(torch.device("cpu"))["packages"] == {"no-such-package": ""}


def test_a_run_asked_to_compile_trains_the_compiled_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Dynamo's graphs run by torch itself; Inductor would take most of a minute. In a graph branches add in another order."""
    torch.compiler.reset()
    graphs = CompileCounterWithBackend("eager")
    ordinary = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **_: ordinary(model, backend=graphs))
    words = ["trainer.save=false", "trainer.checkpoint_every="]
    eager = run(config(tmp_path, *words), tmp_path / "eager", quiet=True).summary
    assert graphs.frame_count == 0
    compiled = run(config(tmp_path, *words, "trainer.compile=true"), tmp_path / "compiled", quiet=True).summary
    assert graphs.frame_count > 0
    assert compiled["metrics"]["final"] == pytest.approx(eager["metrics"]["final"], rel=1e-3)
    assert compiled["compiler"]["graphs"] == graphs.frame_count and compiled["compiler"]["seconds"] > 0.0
    assert "compiler" not in eager
