"""``trainer.profile``: a trace of real steps in the run's folder."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from esper.cli.compose import compose
from esper.running.callbacks import TRACE, profiled
from esper.running.run import run

STEPS = ["trainer.steps=200", "trainer.save=false", "tracking=none", "trainer.control=false"]


def _steps(path: Path) -> int:
    with gzip.open(path, "rt") as file:
        events = json.load(file)["traceEvents"]
    return sum(event.get("name", "").startswith("Optimizer.step#") and event.get("ph") == "X" for event in events)


@pytest.mark.slow
def test_a_run_leaves_a_trace_of_as_many_steps_as_were_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(compose([*STEPS, "trainer.profile=6"]), tmp_path)
    assert _steps(tmp_path / TRACE) == 6
    said = capsys.readouterr()
    assert "trace of the steps 98 to 103" in said.err
    assert f"trace {tmp_path / TRACE} (open it in Perfetto or chrome://tracing)" in " ".join(said.out.split())


def test_the_debug_preset_asks_for_one() -> None:
    assert compose(["debug=profile"]).trainer.profile > 0


class _Counted:
    """What ``profiled`` knows of a trainer."""

    def __init__(self, total: int, steps: int = 0) -> None:
        self.total = total
        self.outcome = self
        self.steps = steps


@pytest.mark.parametrize(("total", "begun", "asked", "said"), [(10, 0, 4, "4 to 7"), (3, 0, 9, "1 to 3"), (10, 6, 2, "8 to 9")])
def test_the_traced_steps_lie_in_the_middle_of_what_is_left(
    total: int, begun: int, asked: int, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer, seen = _Counted(total, begun), []
    with profiled(trainer, seen.append, asked, tmp_path) as between:  # type: ignore[arg-type]
        while trainer.steps < total:
            trainer.steps += 1
            between(trainer)  # type: ignore[arg-type]
    assert f"trace of the steps {said}:" in capsys.readouterr().err
    assert (tmp_path / TRACE).exists() and len(seen) == total - begun


def test_an_interrupted_run_keeps_the_trace_it_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = _Counted(100)
    with pytest.raises(KeyboardInterrupt), profiled(trainer, lambda _: None, 40, tmp_path) as between:  # type: ignore[arg-type]
        for trainer.steps in range(1, 36):
            between(trainer)  # type: ignore[arg-type]
        raise KeyboardInterrupt
    assert "trace of the steps 31 to 35:" in capsys.readouterr().err and (tmp_path / TRACE).exists()


def test_no_trace_where_none_was_asked_for(tmp_path: Path) -> None:
    with profiled(_Counted(10), print, 0, tmp_path) as between:  # type: ignore[arg-type]
        assert between is print
    assert list(tmp_path.iterdir()) == []
