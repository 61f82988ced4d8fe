"""A sweep that is watched: its jobs by status, and those that run by what they tell."""

from __future__ import annotations

import io
import json
from pathlib import Path

from rich.console import Console

from esper.cli.compose import compose
from esper.compare.sweep.resume import write_note
from esper.report.summary_file import write_summary
from esper.running.run_folder import hold_folder
from esper.tracking.parquet_files import ParquetFiles
from esper.tracking.run_info import RunInfo
from esper.watch.terminal import line, page
from esper.watch.views import SweepView
from tests.watch.conftest import story


def begun(folder: Path) -> None:
    """Two arms with two seeds: one job has finished, one has failed, one is made to run by the test, one has not begun."""
    folder.mkdir()
    write_note(folder, {"id": "s1", "parent": "", "name": "a sweep", "command": ["-m"], "ended": False})
    (folder / "plan.json").write_text(json.dumps({"metric": "accuracy", "arms": {"a": {}, "b": {}}, "seeds": [0, 1], "blocks": [""]}))
    for job, error in (("0", ""), ("1", "it broke")):
        (folder / job).mkdir()
        note = {"status": "FAILED" if error else "FINISHED", "error": error, "arm": "a", "block": "", "seconds": 6.0}
        (folder / job / "job.json").write_text(json.dumps(note))
    values = {"final": {"test/accuracy": 0.875}}
    write_summary({"status": "FINISHED", "seed": 0, "primary": "validation/accuracy", "metrics": values}, folder / "0")


def test_a_sweep_shows_its_jobs_and_the_news_of_those_that_run(tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    begun(folder)
    view = SweepView(folder)
    tracker = ParquetFiles()
    (folder / "2").mkdir()
    with hold_folder(compose(["tracking=none"]), folder / "2") as lock:
        lock.begin()
        tracker.open(RunInfo(run="r", name="b", folder=str(folder / "2"), outputs=str(tmp_path), started_ms=0))
        tracker.record(story())
        tracker.flush()
        view.update()
        shown = view.snapshot()
        assert (shown["done"], shown["failed"], shown["jobs"]) == (2, 1, 4)
        rows = {row["name"]: row for row in shown["runs"]}
        assert shown["runs"][0]["status"] == "RUNNING" and rows["2"]["stages"] == {"dormant": 1, "grafting": 1}
        assert (rows["2"]["tick"], rows["2"]["total"], rows["2"]["value"]) == (10, 20, 0.75)
        assert rows["a seed=0"]["value"] == 0.875 and rows["a"]["status"] == "FAILED"
        assert [alert["run"] for alert in shown["alerts"]] == ["2"]
        out = io.StringIO()
        Console(file=out, width=110).print(page(shown, 110))
        assert "10/20" in out.getvalue() and "1 dormant, 1 grafting" in out.getvalue() and "test/accuracy 0.875" in out.getvalue()
    view.update()
    assert view.snapshot()["runs"][0]["status"] == "DIED"  # the context ended without a summary
    assert line(view.snapshot()).startswith("STOPPED 2/4 jobs, 1 failed")
    view.close()


def test_the_time_left_is_that_of_the_jobs_so_far(tmp_path: Path) -> None:
    begun(tmp_path / "sweep")
    view = SweepView(tmp_path / "sweep")
    view.update()
    assert view._left(2, 1) == 12.0 and view._left(2, 2) == 6.0
    assert SweepView(tmp_path / "sweep")._left(2, 1) is None
