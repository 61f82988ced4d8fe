"""``tracking=[mlflow,csv]``: several trackers of one run, TensorBoard and Weights & Biases among them."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from esper.app import main
from esper.bus.memory.bus import MemoryBus
from esper.cli.compose import compose
from esper.compare.sources.table import METRIC, PARAM
from esper.compare.sources.tensorboard import tensorboard_runs
from esper.config import build_group, plain
from esper.errors import UserError
from esper.tracking import CsvConfig, MlflowConfig, TensorBoardConfig, TrackerRunner, WandbConfig, build_trackers, mlflow_in, trackers_in
from esper.tracking.tensorboard_events import TensorBoardEvents
from esper.tracking.wandb_run import WandbRun
from esper.user_code import CustomTracker


def test_several_are_chosen_as_a_list_and_share_the_settings_that_they_have_in_common() -> None:
    config = compose(["tracking=[mlflow,tensorboard,csv]", "tracking.experiment=mine", "tracking.points=50", "tracking.figures=false"])
    first, second, third = trackers_in(config.tracking)
    assert (type(first), type(second), type(third)) == (MlflowConfig, TensorBoardConfig, CsvConfig)
    assert (first.experiment, first.points, second.points, third.figures) == ("mine", 50, 50, False)
    assert mlflow_in(config.tracking) is first
    assert build_group("tracking", plain(config)["tracking"]) == config.tracking
    assert [type(tracker).__name__ for tracker in build_trackers(config.tracking)] == [
        "ParquetFiles", "MlflowSubprocess", "TensorBoardEvents", "CsvFiles",
    ]  # fmt: skip


def test_a_list_of_one_is_that_one_and_an_own_tracker_may_be_in_a_list() -> None:
    assert compose(["tracking=[csv]"]).tracking == CsvConfig()
    words = ["tracking=[custom,csv]", "tracking.target=my_pkg.trackers:Diary", "tracking.args.pages=3"]
    own, beside = trackers_in(compose(words).tracking)
    assert isinstance(own, CustomTracker) and (own.target, own.args) == ("my_pkg.trackers:Diary", {"pages": 3})
    assert isinstance(beside, CsvConfig)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["tracking=[csv,none]"], "stands alone"),
        (["tracking=[]"], "for none write tracking=none"),
        (["tracking=[csv,csv]"], "different trackers"),
        (["tracking=[csv,tensorbord]"], "did you mean tensorboard"),
        (["tracking=[csv,tensorboard]", "tracking.uri=x"], "tracking.uri"),
        (["tracking=[csv,tensorboard]", "tracking.points=1"], "tracking.points takes a whole number from 2"),
        (["tracking=[csv,mlflow]", "tracking.uri=http://me:word@host"], "has an address with a user or password in it"),
    ],
)
def test_what_cannot_be_several_is_refused(words: list[str], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        compose(words)


class Page:
    """A tracker that remembers what it was asked."""

    wants_model = False

    def __init__(self, broken: str = "") -> None:
        self.broken, self.acts = broken, []

    def try_out(self) -> None:
        self._act("try_out")

    def open(self, info) -> None:
        self._act("open")

    def record(self, messages) -> None:
        self._act("record")

    def flush(self) -> None:
        """Nothing to keep."""

    def close(self, status, summary) -> None:
        self._act("close")

    def _act(self, name: str) -> None:
        self.acts.append(name)
        if name == self.broken:
            raise OSError("torn")


@pytest.mark.parametrize(
    ("broken", "first", "last"),
    [("try_out", ["try_out"], ["try_out"]), ("open", ["try_out", "open", "close"], ["try_out"])],
)
def test_a_tracker_that_cannot_work_refuses_the_run_before_the_next_one_begins_it(bus: MemoryBus, info, broken, first, last) -> None:
    pages = [Page(), Page(broken), Page()]
    runner = TrackerRunner(bus, info, pages, poll_s=0.01)
    runner.start()
    with pytest.raises(UserError, match="torn"):
        runner.await_open()
    with pytest.raises(Exception, match="torn"):
        runner.close("FAILED", grace_s=0.0)
    assert (pages[0].acts, pages[2].acts) == (first, last)


@pytest.mark.parametrize(("option", "library"), [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb")])
def test_a_library_that_is_missing_is_named_with_its_extra(option: str, library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    tracker = build_trackers({"tensorboard": TensorBoardConfig(), "wandb": WandbConfig()}[option])[1]
    with pytest.raises(UserError, match=rf"pip install 'esper-grow\[{option}\]'"):
        tracker.try_out()


def _tell(tracker, info, told) -> None:
    getattr(tracker, "try_out", lambda: None)()
    tracker.open(info)
    for start in range(0, len(told), 50):
        tracker.record([message for _, message in told[start : start + 50]])
        tracker.flush()


@pytest.mark.usefixtures("heavy_libraries")
def test_tensorboard_has_curves_settings_results_and_figures(info, story) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = Path(info.folder)
    (parquet, _), told = build_trackers(CsvConfig()), story(60)
    tracker = TensorBoardEvents(TensorBoardConfig())
    _tell(parquet, info, told)
    _tell(tracker, info, told)
    parquet.close("FINISHED", told[-1][1].summary)
    tracker.close("FINISHED", told[-1][1].summary)
    found = tensorboard_runs(folder)
    row = found.frame.iloc[0]
    assert row[METRIC + "final/accuracy"] == pytest.approx(0.91) and row[PARAM + "trainer.steps"] == "100" and row[PARAM + "seed"] == "0"
    curve = found.history(METRIC + "validation/accuracy")
    sent = {m.tick: m.values["validation/accuracy"] for _, m in told if "validation/accuracy" in getattr(m, "values", {})}
    assert dict(zip(curve["step"], curve["value"], strict=True)) == pytest.approx(sent)
    assert METRIC + "sites/layers.0/seeds_dormant" in found.frame.columns
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert sorted(events.Tags()["images"]) == ["figures/gates", "figures/learning", "figures/stages"]
    assert events.Scalars("train/loss")[0].wall_time == pytest.approx(info.started_ms / 1000, abs=1.0)


@pytest.mark.usefixtures("heavy_libraries")
def test_tensorboard_shows_a_resumed_run_as_one_that_never_stopped(info, make_info, story, tmp_path: Path) -> None:
    whole = make_info("run-2", tmp_path / "whole")
    Path(whole.folder).mkdir()
    config = TensorBoardConfig(figures=False)
    killed, resumed, unbroken = (TensorBoardEvents(config) for _ in range(3))
    _tell(killed, info, story(60, until=47))
    _tell(resumed, info, story(60, 30))
    _tell(unbroken, whole, story(60))
    for tracker in (resumed, unbroken):
        tracker.close("FINISHED", story(60)[-1][1].summary)
    one, other = tensorboard_runs(Path(info.folder)), tensorboard_runs(Path(whole.folder))
    assert len(one.frame) == 1
    for name in ("train/loss", "validation/accuracy", "sites/layers.0/seeds_dormant", "final/accuracy"):
        parts = [source.history(METRIC + name)[["step", "value"]].to_numpy().tolist() for source in (one, other)]
        assert parts[0] == parts[1] and parts[0], name


def _stored(folder: Path) -> list:
    """The records of W&B's file: LevelDB's log format, blocks of 32 KiB after a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    (file,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    data, at, parts, found = file.read_bytes(), 7, b"", []
    while at + 7 <= len(data) and at + 7 + int.from_bytes(data[at + 4 : at + 6], "little") <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        parts += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # the whole record, or its last part
            found.append(wandb_internal_pb2.Record.FromString(parts))
            parts = b""
    return found


def _kinds(records: list, kind: str) -> list:
    return [record for record in records if record.WhichOneof("record_type") == kind]


@pytest.mark.usefixtures("processes")
def test_wandb_has_curves_settings_results_and_figures(info, story) -> None:
    told = story(60)
    (parquet, _), tracker = build_trackers(CsvConfig()), WandbRun(WandbConfig(mode="offline", project="mine"))
    _tell(parquet, info, told)
    _tell(tracker, info, told)
    parquet.close("FINISHED", told[-1][1].summary)
    tracker.close("FINISHED", told[-1][1].summary)
    while not _kinds(records := _stored(Path(info.folder)), "exit"):
        time.sleep(0.05)  # W&B's process writes the end of its file after `finish` has returned
    runs = [record.run for record in _kinds(records, "run")]
    assert (runs[0].project, runs[0].display_name) == ("mine", info.name)
    config = {item.key: item.value_json for item in runs[0].config.update}
    assert '"trainer.steps":"100"' in config["chosen"].replace(" ", "")
    rows = [
        {(item.key or "/".join(item.nested_key)): item.value_json for item in record.history.item} for record in _kinds(records, "history")
    ]
    seen = {int(row["tick"]): float(row["validation/accuracy"]) for row in rows if "validation/accuracy" in row}
    sent = {m.tick: m.values["validation/accuracy"] for _, m in told if "validation/accuracy" in getattr(m, "values", {})}
    assert seen == pytest.approx(sent)
    assert any("sites/layers.0/seeds_dormant" in row for row in rows)
    assert sum(any(key.startswith("figures/learning") for key in row) for row in rows) == 1
    assert len(list(Path(info.folder).glob("wandb/offline-run-*/files/media/images/figures/*.png"))) == 3
    assert [record.exit.exit_code for record in _kinds(records, "exit")] == [0]


@pytest.mark.usefixtures("whole_runs")
def test_a_run_is_recorded_by_all_and_goes_on_with_others(tmp_path: Path) -> None:
    place = f"hydra.run.dir={tmp_path / 'run'}"
    words = ["debug=tiny", "tracking=[csv,tensorboard]", "trainer.control=false", "trainer.steps=40", f"output={tmp_path}", place]
    assert main(words) == 0
    assert (tmp_path / "run" / "metrics.csv").is_file() and len(tensorboard_runs(tmp_path / "run").frame) == 1
    assert main([f"resume={tmp_path / 'run'}", "trainer.steps=60", "tracking=[csv,none]"]) == 2
    assert main([f"resume={tmp_path / 'run'}", "trainer.steps=60", "tracking=[tensorboard,csv]", "tracking.figures=false"]) == 0
    found = tensorboard_runs(tmp_path / "run")
    assert found.history(METRIC + "train/loss")["step"].max() == 60
