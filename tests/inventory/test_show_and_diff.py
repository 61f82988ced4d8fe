"""``esper show`` and ``esper diff``: the report once more, and where two runs part."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from esper.app import main
from esper.inventory.find import find
from esper.learn.command import main as learn
from esper.tracking.recorded_tables import read_recorded


def test_the_report_of_a_run_is_that_of_its_end(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(made / "day/run")]) == 0
    said = capsys.readouterr().out
    assert "status                 FINISHED" in said and "Branches" in said and str(made / "day/run") in said
    assert main(["show", "run", f"output={made}"]) == 0 and capsys.readouterr().out == said


def test_the_report_of_a_sweep_is_its_comparison_by_folder_name_and_id(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written = (made / "s/comparison.txt").read_text()
    id = json.loads((made / "s/sweep.json").read_text())["id"]
    for words in ((str(made / "s"),), (id, f"output={made}"), ("mlp-digits sweep: linear, drift", f"output={made}"), (f"output={made}",)):
        assert main(["show", *words]) == 0
        assert capsys.readouterr().out == written


def test_a_sweep_that_was_not_judged_shows_its_jobs_and_how_to_go_on(outputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    note = json.loads((outputs / "s/sweep.json").read_text())
    (outputs / "s/sweep.json").write_text(json.dumps(note | {"ended": False}))
    (outputs / "s/comparison.txt").unlink()
    assert main(["show", str(outputs / "s")]) == 1
    said = capsys.readouterr().out
    assert "stopped, not judged yet" in said and "drift seed=1" in said and f"hydra.sweep.dir={outputs / 's'}" in said


@pytest.mark.usefixtures("heavy_libraries")
def test_a_run_whose_folder_is_gone_is_shown_from_the_store(outputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(outputs / "s")
    for name, said in (("mlp-digits sweep: linear, drift", "against the reference"), ("linear seed=1", "status                 FINISHED")):
        assert main(["show", name, f"output={outputs}"]) == 0
        assert said in capsys.readouterr().out


def test_a_run_without_a_report_says_how_to_go_on(outputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (outputs / "day/run/summary.json").unlink()
    (outputs / "day/run/run.lock").write_text('{"config_hash": "x"}\n')
    assert main(["show", str(outputs / "day/run")]) == 1
    assert f"esper resume={outputs / 'day/run'} goes on" in capsys.readouterr().err


def test_what_cannot_be_found_is_said(made: Path, outputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(outputs / "day", outputs / "night")
    for words, said in (
        (["nothing"], "There is no run or sweep nothing"),
        (["run"], "2 runs are called run; name one by its folder"),
        ([str(outputs)], "is no run's and no sweep's folder"),
        (["a", "b"], "takes one run, and 2 are named: a, b"),
        (["--all"], "'--all' is no option of esper show"),
        (["outptu=x"], "did you mean output?"),
    ):
        assert main(["show", *words, f"output={outputs}"]) == 2
        assert said in capsys.readouterr().err
    assert (
        main(["diff", str(made / "day/run"), str(made / "s")]) == 2 and "is a sweep, and esper diff takes runs" in capsys.readouterr().err
    )
    assert main(["diff", str(made / "day/run")]) == 2 and "esper diff takes two runs" in capsys.readouterr().err


def test_diff_names_config_metric_telemetry_and_weights(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diff", "linear seed=0", "linear seed=1", f"output={made}"]) == 1
    said = capsys.readouterr().out.splitlines()
    assert said[:2] == ["not the same bits", "  config: seed is 0 and 1"]
    assert said[2].startswith("  step: the first values to differ are those of ")
    assert said[3].startswith("  telemetry: the first row to differ is seed 0 at fc1, tick ")
    assert said[4] == "  weights:"


def test_diff_finds_the_first_row_of_telemetry_that_differs(outputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = outputs / "day/run", outputs / "copy"
    shutil.copytree(one, other)
    summary = json.loads((other / "summary.json").read_text())
    (other / "summary.json").write_text(json.dumps(summary | {"fingerprint": "another"}))
    table = read_recorded(other, "seeds")
    frame = table.to_pandas()
    row = frame[(frame.tick == 20) & (frame.site == "fc2") & (frame.seed == 1)].index[0]
    frame.loc[row, "variance"] = 123.0
    frame.loc[frame[frame.tick == 25].index, "mean"] = 5.0
    shuffled = table.from_pandas(frame, schema=table.schema).take(list(reversed(range(len(table)))))  # sites come in any order
    pq.write_table(shuffled, other / "seeds.parquet")
    assert main(["diff", str(one), str(other)]) == 1
    said = capsys.readouterr().out
    assert "telemetry: the first row to differ is seed 1 at fc2, tick 20: variance is " in said and " and 123.0" in said
    assert "step:" not in said and "config" not in said


def test_a_run_that_has_not_ended_is_compared_as_far_as_it_came(outputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = outputs / "day/run", outputs / "copy"
    shutil.copytree(one, other)
    (other / "summary.json").unlink()
    (other / "run.lock").write_text('{"config_hash": "x"}\n')
    (other / ".parts").mkdir()
    for name in ("metrics", "seeds", "transitions", "gates"):
        table = read_recorded(other, name)
        (other / f"{name}.parquet").unlink()
        pq.write_table(table.filter([tick <= 24 for tick in table["tick"].to_pylist()]), other / ".parts" / f"{name}.0000.000000.parquet")
    assert main(["diff", str(one), str(other)]) == 1
    said = capsys.readouterr().out
    assert said.startswith(f"no end yet of {other}; so far:") and "telemetry" not in said and "step" not in said
    assert find(str(other), {}).status == "DIED"


def test_a_policy_is_learnt_from_the_jobs_of_a_sweep_and_from_the_store_where_their_folders_are_gone(
    outputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for passes in ("IMITATION", "IMPROVEMENT"):
        monkeypatch.setattr(f"esper.learn.training.{passes}", 2)
    assert learn([str(outputs / "s"), f"output={outputs}", f"to={tmp_path / 'first.safetensors'}"]) == 0
    there = capsys.readouterr().out
    for gone in ("s", "day"):
        shutil.rmtree(outputs / gone)
    assert learn([f"output={outputs}", f"to={tmp_path / 'second.safetensors'}"]) == 0
    stored = capsys.readouterr().out
    for said in (there, stored):
        assert said.startswith("runs          4, 1 of them held out") and "16 germinate" in said
