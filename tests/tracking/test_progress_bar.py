"""The progress bar shows what the bus says, on a terminal and in a plain log."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from esper.bus.config import MemoryConfig
from esper.bus.memory.bus import MemoryBus
from esper.lifecycle.stages import Stage
from esper.messages import Alert, Message, Metrics, RunStarted, Telemetry, TickEnded, Transition
from esper.tracking import RunInfo, TrackerRunner
from esper.tracking.progress_bar import ProgressBar, ProgressState


def said(tick: int = 40) -> list[Message]:
    stages = np.array([[[0.0], [2.0], [2.0]]], np.float32)
    return [
        RunStarted(tick=0, total_ticks=100, sites=[{"name": "layers.0", "seeds": 3}, {"name": "layers.1", "seeds": 2}]),
        Telemetry(site="layers.0", ticks=[tick], seeds=3, columns=["stage"], data=stages.tobytes()),
        Transition(tick=tick, site="layers.1", seed=1, branch=0, source=0, target=Stage.GERMINATED, cause="command"),
        Transition(tick=tick, site="blocks", seed=-1, branch=4, source=2, target=Stage.GRAFTING, cause="gate"),
        Metrics(
            tick=tick,
            values={
                "train/loss": 0.51234,
                "validation/accuracy": 0.875,
                "cost/steps": 80.0,
                "cost/seconds": 10.0,
                "cost/shadow_seconds": 0.5,
                "cost/judge_seconds": 1.0,
            },
        ),
        TickEnded(tick=tick),
    ]


def test_the_line_holds_loss_score_seeds_per_stage_share_rate_and_time_left():
    now = [0.0]
    state = ProgressState("accuracy", clock=lambda: now[0])
    state.mark()
    now[0] = 2.0
    for message in said():
        state.take(message)
    state.mark()
    assert state.stages == {"dormant": 2, "germinated": 1, "training": 2, "grafting": 1}
    line = state.line()
    assert "train loss 0.5123" in line and "validation accuracy 0.875" in line and "2 training" in line
    assert "shadow+judge 15%" in line and "40 steps/s" in line and "0:03 left" in line


def test_two_losses_are_named_apart():
    state = ProgressState("validation/loss")
    state.take(Metrics(tick=1, values={"train/loss": 0.5, "validation/loss": 0.25}))
    assert state.line().startswith("train loss 0.5 · validation loss 0.25 · ")


def test_the_rate_forgets_what_is_long_past():
    now = [0.0]
    state = ProgressState("", clock=lambda: now[0])
    for second in range(20):
        now[0] = float(second)
        state.take(TickEnded(tick=second if second < 10 else 10 + 100 * (second - 10)))
        state.mark()
    assert state.steps_per_second == 100.0


def test_before_the_first_message_nothing_is_known():
    assert ProgressState("accuracy").line() == "train loss – · validation accuracy – · – steps/s · – left"


def show(terminal: bool, tmp_path: Path, plain_s: float = 0.0) -> str:
    out = io.StringIO()
    bus = MemoryBus(MemoryConfig(), tmp_path)
    bar = ProgressBar(Console(file=out, force_terminal=terminal, width=220), plain_s=plain_s)
    record = RunInfo(run="r", name="r", folder=str(tmp_path), outputs=str(tmp_path), started_ms=0, primary="validation/accuracy")
    runner = TrackerRunner(bus, record, [bar], group="progress", poll_s=0.01)
    runner.start()
    producers = {stream: bus.producer(stream, "r") for stream in ("events", "telemetry")}
    for message in [
        *said(),
        Alert(tick=40, level="warning", code="x", text="seed [3] has NaN"),
        Alert(tick=40, level="info", code="y", text="quiet"),
    ]:
        producers["telemetry" if isinstance(message, Telemetry) else "events"].publish(message)
    assert runner.drain(5.0)
    runner.close("FINISHED")
    bus.close()
    return out.getvalue()


def test_a_terminal_gets_a_bar_and_warnings(tmp_path: Path):
    text = show(True, tmp_path)
    assert "━" in text and "40/100" in text and "accuracy 0.875" in text
    assert "seed [3] has NaN" in text and "quiet" not in text


@pytest.mark.slow
def test_a_log_gets_plain_lines(tmp_path: Path):
    text = show(False, tmp_path)
    assert "40/100 · train loss 0.5123" in text and "\x1b" not in text


@pytest.mark.slow
def test_a_log_gets_at_least_the_last_line_of_a_short_run(tmp_path: Path):
    assert show(False, tmp_path, plain_s=3600.0).count("40/100") == 1
