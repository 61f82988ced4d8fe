"""Figures come from the recorded files alone, and are there exactly when there is something to see."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from esper.lifecycle.stages import Stage
from esper.messages import GateResult, Metrics, RunStarted, Transition
from esper.tracking.figures import draw_all
from esper.tracking.figures.gate_margins import gate_margins
from esper.tracking.figures.history import read_history
from esper.tracking.figures.learning_curves import learning_curves
from esper.tracking.figures.stage_timeline import MAX_ROWS, stage_timeline
from esper.tracking.figures.style import STAGE_COLOURS, STAGE_LETTERS
from esper.tracking.parquet_files import ParquetFiles


def recorded(info, messages) -> Path:
    tracker = ParquetFiles()
    tracker.open(info)
    tracker.record(messages)
    tracker.close("FINISHED", {})
    return Path(info.folder)


@pytest.fixture
def folder(info, story) -> Path:
    return recorded(info, [message for _, message in story(200)])


def test_a_run_that_grew_has_all_three_figures(folder: Path):
    drawn = draw_all(folder)
    assert [path.name for path in drawn] == ["stages.png", "learning.png", "gates.png"]
    for path in drawn:
        image = imread(path)
        assert image.shape[1] >= 800 and len(np.unique((image[::7, ::7, :3] * 255).astype(int) @ [65536, 256, 1])) > 10


def test_a_life_is_the_path_from_germination_on(folder: Path):
    history = read_history(folder)
    assert [(branch.site, branch.seed) for branch in history.branches] == [("layers.0", 1), ("layers.0", 3), ("layers[1]", 0)]
    assert [stage for stage, _ in history.branches[1].path] == [
        "GERMINATED",
        "TRAINING",
        "GRAFTING",
        "STABILIZATION",
        "EVALUATING",
        "CULLED",
        "DORMANT",
    ]
    assert history.last == 200
    assert history.branches[0].label == "layers.0 · seed 1 · mlp"


def test_the_timeline_has_a_bar_for_every_stage_of_every_branch(folder: Path):
    history = read_history(folder)
    axes = stage_timeline(history).axes[0]
    bars = [bar for container in axes.containers for bar in container]
    assert len(bars) == sum(len([s for s, _ in branch.path if s != "DORMANT"]) for branch in history.branches)
    first = history.branches[0].path
    assert bars[0].get_x() == first[0][1] and bars[0].get_width() == first[1][1] - first[0][1]


def test_curves_are_drawn_against_ticks_and_against_macs(folder: Path):
    history = read_history(folder)
    figure = learning_curves(history)
    by_tick, by_macs = figure.axes[0], figure.axes[1]
    assert by_tick.get_xlim()[1] == 200
    assert by_macs.get_xlim()[1] == pytest.approx(history.metrics["cost/macs"][1][-1])
    germinated = [line.get_xdata()[0] for line in by_tick.lines if len(line.get_xdata()) == 2 and line.get_color() == "#666666"]
    assert germinated == [20, 40, 60]


def test_the_host_alone_is_drawn_beside_the_run_at_the_same_steps_and_at_the_same_macs(folder: Path):
    curves = {
        "same_steps": {"validation/accuracy": [[100, 1e8, 0.5], [200, 2e8, None]]},
        "same_macs": {"validation/accuracy": [[150, 1.5e8, 0.5], [300, 3e8, 0.7]]},
    }
    (folder / "summary.json").write_text(json.dumps({"name": "mlp-digits", "seed": 3, "control_curves": curves}))
    (folder / "config.yaml").write_text("lifecycle: {clock: epoch}\n")
    figure = learning_curves(read_history(folder))
    by_tick, by_macs = (next(line for line in axes.lines if line.get_linestyle() == "--") for axes in figure.axes[:2])
    assert by_tick.get_xdata().tolist() == [100, 200] and by_tick.get_ydata()[0] == 0.5 and math.isnan(by_tick.get_ydata()[1])
    assert by_macs.get_xdata().tolist() == [1.5e8, 3e8] and by_macs.get_ydata().tolist() == [0.5, 0.7]
    assert "validation/accuracy, the host alone" in [text.get_text() for text in figure.axes[0].get_legend().get_texts()]


def test_every_figure_says_which_run_it_shows_and_in_what_units(folder: Path):
    (folder / "summary.json").write_text(json.dumps({"name": "mlp-digits", "seed": 3}))
    (folder / "config.yaml").write_text("lifecycle: {clock: epoch}\n")
    history = read_history(folder)
    curves, margins, timeline = learning_curves(history), gate_margins(history), stage_timeline(history)
    for title in (curves.get_suptitle(), margins.get_suptitle(), timeline.axes[0].get_title(loc="left")):
        assert title.endswith(": mlp-digits, seed 3")
    assert curves.axes[0].get_ylabel() == "validation/accuracy (fraction of examples)"
    assert curves.axes[0].get_xlabel() == timeline.axes[0].get_xlabel() == "tick (epoch)"
    assert "multiply-accumulates" in curves.axes[1].get_xlabel()


def test_branches_asked_at_one_tick_are_drawn_at_that_tick(info):
    asked = [
        GateResult(tick=4, site="a", seed=seed, branch=seed, gate="gain", value=0.1 * seed, threshold=0.0, passed=True) for seed in range(3)
    ]
    figure = gate_margins(read_history(recorded(info, asked)))
    axes = figure.axes[0]
    marked = [line for line in axes.lines if line.get_marker() not in ("None", "") and len(line.get_xdata())]
    assert [line.get_transform().transform((4.0, 0.0)).tolist() for line in marked] == [axes.transData.transform((4.0, 0.0)).tolist()] * 3
    assert len({line.get_marker() for line in marked}) == 3


def test_margins_are_value_minus_threshold_and_nan_lies_on_the_floor(info):
    messages = [
        GateResult(tick=t, site="a", seed=0, branch=0, gate="gain", value=v, threshold=0.5, passed=v >= 0.5)
        for t, v in enumerate((0.1, math.nan, 0.7))
    ]
    figure = gate_margins(read_history(recorded(info, messages)))
    values = figure.axes[0].lines[0].get_ydata()
    assert values[[0, 2]] == pytest.approx([-0.4, 0.2]) and values[1] < -0.4


def test_no_marker_lies_outside_its_panel(folder: Path):
    for axes in gate_margins(read_history(folder)).axes[:5]:
        low, high = axes.get_ylim()
        assert all(low < y < high for line in axes.lines for y in line.get_ydata())


def test_without_growth_there_are_learning_curves_only(info):
    folder = recorded(
        info,
        [
            RunStarted(tick=0, total_ticks=2, sites=[]),
            Metrics(tick=1, values={"train/loss": 1.0}),
            Metrics(tick=2, values={"train/loss": 0.5}),
        ],
    )
    assert [path.name for path in draw_all(folder)] == ["learning.png"]


def test_an_empty_run_has_no_figure(info):
    assert draw_all(recorded(info, [])) == []


def test_many_branches_blocks_and_generations_stay_readable(info):
    messages = [
        Transition(
            tick=i,
            site="blocks",
            seed=-1,
            branch=i,
            source=0,
            target=Stage.GERMINATED,
            cause="x",
            generation=2,
            blueprint="block",
        )
        for i in range(MAX_ROWS + 5)
    ]
    messages += [
        GateResult(tick=i, site="blocks", seed=-1, branch=i, gate="ramp", value=1.0, threshold=0.5, passed=True)
        for i in range(MAX_ROWS + 5)
    ]
    history = read_history(recorded(info, messages))
    axes = stage_timeline(history).axes[0]
    assert len(axes.get_yticks()) == MAX_ROWS and f"first {MAX_ROWS} of {MAX_ROWS + 5}" in axes.get_title(loc="left")
    assert axes.get_yticklabels()[0].get_text() == "blocks · block gen 2 · block"
    texts = [text.get_text() for text in gate_margins(history).legends[0].get_texts()]
    assert f"{MAX_ROWS + 5 - 6} others" in texts


def test_every_stage_but_dormant_has_a_colour_and_a_letter_of_its_own():
    names = {stage.name for stage in Stage} - {"DORMANT"}
    assert set(STAGE_COLOURS) == set(STAGE_LETTERS) == names
    assert len(set(STAGE_COLOURS.values())) == len(set(STAGE_LETTERS.values())) == len(names)
