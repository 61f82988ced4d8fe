"""Parquet and CSV files: every row of the story, whole files only, and resumed runs without hole or double."""

from __future__ import annotations

import csv
import json
import resource
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from esper.lifecycle.stages import Stage
from esper.messages import Alert, GateResult, Metrics, RunEnded, RunStarted, Telemetry, TickEnded, Transition
from esper.tracking import CsvConfig, NoneConfig, TrackerError, TrackerRunner, build_trackers
from esper.tracking.arrow_tables import TABLES
from esper.tracking.csv_files import CsvFiles
from esper.tracking.parquet_files import PARTS, ParquetFiles


def keep(tracker, info, told, status: str | None = "FINISHED", batch: int = 37) -> None:
    tracker.open(info)
    messages = [message for _, message in told]
    for start in range(0, len(messages), batch):
        tracker.record(messages[start : start + batch])
        tracker.flush()
    if status:
        tracker.close(status, {})


def read(info, name: str):
    return pq.read_table(Path(info.folder) / f"{name}.parquet")


def test_seed_rows_come_back_as_they_were_sent(info, story):
    told = story(60)
    keep(ParquetFiles(), info, told)
    table = read(info, "seeds")
    sent = [m for _, m in told if isinstance(m, Telemetry)]
    assert len(table) == sum(len(m.ticks) * m.seeds for m in sent)
    first = table.to_pylist()[0]
    assert {"tick", "site", "seed", "stage_name", "stage", "alpha", "gain"} <= first.keys()
    chosen = [row for row in table.to_pylist() if row["site"] == "layers.0" and row["seed"] == 1]
    values = np.array([np.frombuffer(m.data, "<f4").reshape(4, -1)[1, 0] for m in sent if m.site == "layers.0"])
    assert [row["stage"] for row in chosen] == values.tolist()
    assert {row["stage_name"] for row in chosen} >= {"DORMANT", "TRAINING", "FOSSILIZED"}
    assert all(Stage[row["stage_name"]] == row["stage"] for row in chosen)


def test_transitions_carry_stage_names_and_cause(info, story):
    told = story(60)
    keep(ParquetFiles(), info, told)
    rows = read(info, "transitions").to_pylist()
    sent = [m for _, m in told if isinstance(m, Transition)]
    assert [(r["tick"], r["site"], r["seed"], r["source"], r["target"]) for r in rows] == [
        (m.tick, m.site, m.seed, Stage(m.source).name, Stage(m.target).name) for m in sent
    ]
    assert {"cause", "generation", "blueprint", "strategy", "branch"} <= rows[0].keys()


def test_gates_and_metrics_are_kept_too(info, story):
    told = story(60)
    keep(ParquetFiles(), info, told)
    assert len(read(info, "gates")) == sum(isinstance(m, GateResult) for _, m in told)
    values = [(r["tick"], r["name"], r["value"]) for r in read(info, "metrics").to_pylist()]
    assert values == [(m.tick, name, value) for _, m in told if isinstance(m, Metrics) for name, value in m.values.items()]


@pytest.mark.parametrize("group_rows", [2, 1 << 16])
def test_of_a_metric_said_twice_at_a_tick_the_last_word_stands(info, monkeypatch, group_rows):
    monkeypatch.setattr("esper.tracking.parquet_files.GROUP_ROWS", group_rows)
    said = [(1, "a", 1.0), (1, "b", 2.0), (1, "a", 3.0), (2, "a", 4.0), (2, "b", 5.0), (2, "a", 6.0)]
    keep(ParquetFiles(), info, [("events", Metrics(tick=t, values={n: v})) for t, n, v in said], batch=1)
    found = [(row["tick"], row["name"], row["value"]) for row in read(info, "metrics").to_pylist()]
    assert sorted(found) == [(1, "a", 3.0), (1, "b", 2.0), (2, "a", 6.0), (2, "b", 5.0)]
    assert [tick for tick, _, _ in found] == [1, 1, 2, 2]


def test_a_silent_run_leaves_empty_tables_with_all_columns(info):
    keep(ParquetFiles(), info, [])
    for name in TABLES:
        assert len(read(info, name)) == 0
    assert "gain" in read(info, "seeds").column_names and "cause" in read(info, "transitions").column_names


def test_a_killed_run_leaves_readable_parts_and_no_half_file(info, story):
    keep(ParquetFiles(), info, story(100, until=60), status=None)
    folder = Path(info.folder)
    assert not list(folder.glob("*.parquet"))
    parts = sorted((folder / PARTS).glob("seeds.*.parquet"))
    assert len(parts) > 2 and not list((folder / PARTS).glob("*.tmp"))
    assert sum(len(pq.read_table(part)) for part in parts) == 60 * 2 * 4


@pytest.mark.parametrize("ended_before", [None, "KILLED"])
def test_a_resumed_run_leaves_neither_hole_nor_double(info, make_info, story, tmp_path, ended_before):
    whole = make_info("run-2", tmp_path / "outputs" / "whole")
    keep(ParquetFiles(), whole, story(100))
    keep(ParquetFiles(), info, story(100, until=63), status=ended_before)
    keep(ParquetFiles(), info, story(100, since=50))
    for name in TABLES:
        assert read(info, name).to_pylist().__repr__() == read(whole, name).to_pylist().__repr__(), name
    assert not (Path(info.folder) / PARTS).exists()


@pytest.mark.parametrize("ahead", ["events", "telemetry", None])
def test_a_resumed_run_heard_in_one_go_has_no_tick_twice_whichever_stream_is_ahead(info, make_info, story, tmp_path, ahead):
    whole = make_info("run-2", tmp_path / "outputs" / "whole")
    keep(ParquetFiles(), whole, story(100))
    told = [*story(100, until=63), *story(100, since=50, until=80), *story(100, since=70)]
    if ahead:
        told.sort(key=lambda pair: pair[0] != ahead)
        told.insert(0, told.pop(next(n for n, (_, message) in enumerate(told) if isinstance(message, RunStarted))))
    keep(ParquetFiles(), info, told)
    for name in TABLES:
        assert read(info, name).to_pylist().__repr__() == read(whole, name).to_pylist().__repr__(), name


def test_what_a_killed_run_said_after_its_last_checkpoint_goes_though_its_resumed_life_says_nothing(info, story):
    ended = [("events", RunStarted(tick=50, total_ticks=50, sites=[])), ("events", RunEnded(tick=50, status="FINISHED", summary={}))]
    keep(ParquetFiles(), info, [*story(100, until=63), *ended])
    for name in ("seeds", "metrics"):
        assert max(read(info, name)["tick"].to_pylist()) == 50, name


def test_buffered_rows_are_written_before_memory_grows(info, monkeypatch, story):
    monkeypatch.setattr("esper.tracking.parquet_files.BUFFER_BYTES", 1000)
    tracker = ParquetFiles()
    tracker.open(info)
    tracker.record([message for _, message in story(20)])
    assert list((Path(info.folder) / PARTS).glob("seeds.*.parquet"))


def test_packed_telemetry_is_refused_by_name(info):
    message = Telemetry(site="a", ticks=[1], seeds=1, columns=["stage"], codec="delta", data=b"")
    tracker = ParquetFiles()
    tracker.open(info)
    tracker.record([message])
    with pytest.raises(TrackerError, match=r"'a'.*'delta'"):
        tracker.flush()


def test_csv_holds_every_metric_and_jsonl_every_event(info, story):
    told = story(60)
    keep(CsvFiles(CsvConfig(figures=False)), info, told)
    with (Path(info.folder) / "metrics.csv").open() as file:
        rows = [(int(r["tick"]), r["name"], float(r["value"])) for r in csv.DictReader(file)]
    assert rows == [(m.tick, name, value) for _, m in told if isinstance(m, Metrics) for name, value in m.values.items()]
    events = [json.loads(line) for line in (Path(info.folder) / "events.jsonl").read_text().splitlines()]
    kept = [m for _, m in told if not isinstance(m, Metrics | Telemetry | TickEnded)]
    assert [event["kind"] for event in events] == [type(m).__name__ for m in kept]


def test_a_resumed_csv_has_no_tick_twice(info, story):
    config = CsvConfig(figures=False)
    keep(CsvFiles(config), info, story(100, until=70), status="KILLED")
    keep(CsvFiles(config), info, story(100, since=50))
    with (Path(info.folder) / "metrics.csv").open() as file:
        ticks = [int(r["tick"]) for r in csv.DictReader(file) if r["name"] == "train/loss"]
    assert ticks == list(range(1, 101))
    events = [json.loads(line) for line in (Path(info.folder) / "events.jsonl").read_text().splitlines()]
    assert [event["tick"] for event in events if event["kind"] == "RunStarted"] == [0, 50]
    assert len([e for e in events if e["kind"] == "Transition"]) == len([m for _, m in story(100) if isinstance(m, Transition)])


def test_what_is_said_again_after_the_last_checkpoint_is_written_once(info, story):
    config, told = CsvConfig(figures=False), story(20)
    end = [Alert(tick=20, level="warning", code="kept", text="a sentence"), Alert(tick=20, level="info", code="other", text="another")]
    keep(CsvFiles(config), info, [*told[:-1], (0.0, end[0])], status="KILLED")
    keep(CsvFiles(config), info, [*story(20, since=20), *((0.0, alert) for alert in end)])
    events = [json.loads(line) for line in (Path(info.folder) / "events.jsonl").read_text().splitlines()]
    assert [event["code"] for event in events if event["kind"] == "Alert" and event["tick"] == 20] == ["kept", "other"]


def test_a_disk_without_room_leaves_what_a_csv_said_before(info, story):
    """As does a process killed there: a resumed run rewrites its files beside the old ones."""
    config, folder = CsvConfig(figures=False), Path(info.folder)
    keep(CsvFiles(config), info, story(200, until=150), status="KILLED")
    before = {name: (folder / name).read_bytes() for name in ("metrics.csv", "events.jsonl")}
    tracker, limits = CsvFiles(config), resource.getrlimit(resource.RLIMIT_FSIZE)
    tracker.open(info)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before["metrics.csv"]) // 4, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            tracker.record([message for _, message in story(200, since=140)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {name: (folder / name).read_bytes() for name in before} == before


def test_tracking_none_keeps_the_parquet_files_alone(bus, info, story, publish):
    runner = TrackerRunner(bus, info, build_trackers(NoneConfig()), poll_s=0.01)
    runner.start()
    publish(info.run, story(30))
    runner.close("FINISHED")
    assert sorted(path.name for path in Path(info.folder).iterdir()) == sorted(["started.json", *(f"{name}.parquet" for name in TABLES)])


def test_a_full_disk_is_an_error_at_close_not_a_shorter_file(bus, info, story, publish, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pyarrow.parquet.write_table", full)
    runner = TrackerRunner(bus, info, build_trackers(NoneConfig()), poll_s=0.01)
    runner.start()
    publish(info.run, story(30))
    with pytest.raises(TrackerError, match="No space left"):
        runner.close("FINISHED")
    assert not list(Path(info.folder).glob("*.parquet"))
