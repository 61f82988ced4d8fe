"""``experiments/side_by_side.py``: lanes with cores of their own, studies that end in time, archives of sweeps."""

from __future__ import annotations

import os
import sys
import tarfile
import time
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "experiments"))
import side_by_side
from side_by_side import Lane, SideBySide, lanes_of

PRINTS = "import os, sys\nprint(sorted(os.sched_getaffinity(0)), repr(os.environ.get('CUDA_VISIBLE_DEVICES')), *sys.argv[1:])\n"


def test_lanes_have_cores_of_their_own_while_there_are_enough_and_studies_in_a_row() -> None:
    first, second = lanes_of(["gpu:3 growth_map task.files=[*.py]", "cpu:2 a/run.py --out {out} + digits_why"], list(range(8)))
    assert first == Lane(True, (0, 1, 2), (("growth_map", "task.files=[*.py]"),))
    assert second == Lane(False, (3, 4), (("a/run.py", "--out", "{out}"), ("digits_why",)))
    assert [lane.cores for lane in lanes_of(["cpu:3 a", "cpu:4 b"], [5, 7])] == [(5, 7), (5, 7)]
    assert [side_by_side.named((name,)) for name in ("digits_why", "experiments/aa/run.py", "experiments/list.py")] == [
        "digits_why",
        "aa",
        "list",
    ]


@pytest.mark.parametrize("text", ["growth_map", "cpu growth_map", "cpu:0 growth_map", "tpu:2 growth_map", "cpu:2", "cpu:2 a +"])
def test_a_lane_without_share_or_study_is_refused(text: str) -> None:
    with pytest.raises(SystemExit, match="is no lane"):
        lanes_of([text], [0, 1])


def test_an_experiment_is_told_its_time_and_cores_and_keeps_what_the_lane_says(tmp_path: Path) -> None:
    call = SideBySide(1.0, tmp_path / "out", tmp_path / "work", {})
    lane = lanes_of(["cpu:2 digits_why hydra.launcher.workers=7 task.path={torch}"], [0, 1])[0]
    words = call._words("digits_why", lane, lane.studies[0], 1.5)
    assert words[:3] == ["-m", "esper", "experiment=digits_why"]
    assert "hydra.launcher.minutes=1.50" in words and "hydra.launcher.workers=7" in words and "hydra.launcher.workers=2" not in words
    assert Path(words[-1].removeprefix("task.path=")).name == "torch"


@pytest.mark.usefixtures("processes")
def test_programs_run_with_their_share_and_one_that_does_not_end_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program, endless = tmp_path / "shows" / "run.py", tmp_path / "endless" / "run.py"
    for one in (program, endless):
        one.parent.mkdir()
    program.write_text(PRINTS)
    endless.write_text("import time\nwhile True: time.sleep(1)\n")
    monkeypatch.setattr(side_by_side, "GRACE_S", 0.5)
    out = tmp_path / "out"
    out.mkdir()
    call = SideBySide(0.02, out, tmp_path, {})
    began = time.monotonic()
    available = os.sched_getaffinity(0)
    call.run_all(lanes_of([f"cpu:1 {program} --out {{out}} {{cores}}", f"cpu:1 {endless}"], [0]))
    assert os.sched_getaffinity(0) == available
    assert call.codes == {"shows": 0, "endless": -15}
    assert (out / "shows.log").read_text() == f"[0] '' --out {out / 'shows'} 1\n"
    assert time.monotonic() - began < 60


@pytest.mark.usefixtures("processes")
def test_the_archive_of_a_sweep_leaves_its_large_files_out(tmp_path: Path) -> None:
    call = SideBySide(1.0, tmp_path, tmp_path / "work", {})
    folder = tmp_path / "work" / "digits_why" / "0"
    folder.mkdir(parents=True)
    for name in ("summary.json", "telemetry.parquet", "events.jsonl"):
        (folder / name).write_text(name)
    call._pack("digits_why")
    with tarfile.open(tmp_path / "digits_why.tgz") as archive:
        assert sorted(Path(one).name for one in archive.getnames()) == ["0", "digits_why", "summary.json"]


@pytest.mark.usefixtures("processes")
def test_without_mps_the_processes_take_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(side_by_side, "CONTROL", "no-such-control")
    assert side_by_side.shared_gpu(tmp_path) == {}
    assert "MPS does not work here" in capfd.readouterr().out
