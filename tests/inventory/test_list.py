"""``esper list``: runs and sweeps of a folder and its store."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from esper.app import main
from esper.inventory.filters import age, chosen
from esper.inventory.folder import entries
from esper.inventory.list_command import known


def listed(capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    """The lines of the table without its heading."""
    assert main(["list", *words]) == 0
    return capsys.readouterr().out.splitlines()[1:]


def test_a_run_and_a_sweep_are_listed_with_arms_metric_status_cost_age_and_folder(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep, run = listed(capsys, f"output={made}")
    assert "mlp-digits sweep: linear, drift" in sweep and "linear, drift" in sweep and "accuracy: inconclusive" in sweep
    assert "FINISHED 4/4" in sweep and " M MACs" in sweep and sweep.endswith(f"{made}/s")
    assert run.startswith("mlp-digits seed=7") and "test/accuracy 0." in run and "FINISHED" in run and run.endswith(f"{made}/day/run")


def test_the_jobs_of_a_sweep_are_listed_by_its_id_and_by_its_folder(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    id = json.loads((made / "s" / "sweep.json").read_text())["id"]
    by_id = listed(capsys, f"output={made}", f"sweep={id}", "sort=name")
    assert [line.split("  ")[0] for line in by_id] == [f"{arm} seed={seed}" for arm in ("drift", "linear") for seed in (0, 1)]
    assert len(listed(capsys, f"output={made}", f"sweep={made}/s")) == 4
    assert len(listed(capsys, f"output={made}", "arm=dri*", "kind=job")) == 2


def test_filters_choose_and_a_wrong_one_is_refused(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(listed(capsys, f"output={made}", "kind=run,job", "limit=2")) == 2
    assert listed(capsys, f"output={made}", "status=failed") == []
    assert listed(capsys, f"output={made}", "older=1d") == []
    assert len(listed(capsys, f"output={made}", "name=seed=7", "newer=1d", "metric=accuracy")) == 1
    for word, said in (("stat=failed", "did you mean status?"), ("status=fail", "did you mean failed?"), ("older=3", "as in older=7d")):
        assert main(["list", f"output={made}", word]) == 2
        assert said in capsys.readouterr().err
    assert main(["list", "output=nowhere"]) == 2 and "There is no folder nowhere" in capsys.readouterr().err


def test_ages_have_units() -> None:
    assert [age(text, "newer") for text in ("90s", "1.5m", "2h", "1d", "1w")] == [90, 90, 7200, 86_400, 604_800]


def test_json_holds_what_the_table_does(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", f"output={made}", "--json"]) == 0
    sweep, run = json.loads(capsys.readouterr().out)
    assert (sweep["kind"], sweep["arms"], sweep["done"], sweep["jobs"]) == ("sweep", ["linear", "drift"], 4, 4)
    assert run["value"] == json.loads((made / "day/run/summary.json").read_text())["metrics"]["final"]["test/accuracy"]


def test_a_run_whose_folder_is_gone_is_listed_from_the_store(outputs: Path, made: Path) -> None:
    here = {entry.name: entry for entry in known({"output": str(made)})}
    assert all(entry.folder for entry in here.values())
    shutil.rmtree(outputs / "s")
    stored = {entry.name: entry for entry in known({"output": str(outputs)}) if entry.folder is None}
    jobs = sorted(entry.name for entry in stored.values() if entry.kind == "job")
    assert jobs == [f"{arm} seed={n}" for arm in ("drift", "linear") for n in (0, 1)]
    sweep = stored["mlp-digits sweep: linear, drift"]
    assert (sweep.arms, sweep.done, sweep.jobs, sweep.verdict) == (("drift", "linear"), 4, 4, "inconclusive")
    assert stored["linear seed=1"].value == here["linear seed=1"].value and stored["linear seed=1"].macs == here["linear seed=1"].macs
    assert all(entry.folder for entry in known({"output": str(outputs), "uri": "none"}))


def test_a_folder_that_was_moved_is_still_the_one_that_the_store_knows(outputs: Path) -> None:
    found = known({"output": str(outputs)})
    assert len(found) == 6 and all(entry.folder for entry in found)


def test_a_damaged_run_is_listed_as_such_and_hides_no_other(outputs: Path) -> None:
    (outputs / "s/0/summary.json").write_text("{ torn")
    (outputs / "s/1/summary.json").unlink()
    found = {entry.id: entry.status for entry in entries(outputs)}
    assert found["0"] == "DAMAGED" and found["1"] == "NEW" and found["run"] == "FINISHED"


def test_what_is_under_way_is_running(outputs: Path) -> None:
    (outputs / "day/run/run.lock").write_text('{"config_hash": "x"}\n')
    assert {entry.id: entry.status for entry in entries(outputs)}["run"] == "DIED"
    code = f"from esper.running.run_folder import try_lock; f=open({str(outputs / 'day/run/run.lock')!r},'a'); print(try_lock(f)); input()"
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "True\n"
        assert {entry.id: entry.status for entry in entries(outputs)}["run"] == "RUNNING"
    finally:
        process.communicate("\n")


def test_links_are_not_followed_and_other_files_are_passed_over(outputs: Path) -> None:
    (outputs / "again").symlink_to(outputs / "day")
    (outputs / "notes").mkdir()
    (outputs / "notes/summary.txt").write_text("mine")
    assert len(entries(outputs)) == 6


def test_the_order_is_that_of_the_metric_with_missing_values_last(outputs: Path) -> None:
    (outputs / "s/2/summary.json").write_text('{"status": "KILLED"}')
    found = chosen(entries(outputs), {"kind": "job,run", "sort": "metric"}, 0.0)
    values = [entry.value for entry in found]
    assert values[:4] == sorted(values[:4], reverse=True) and values[4] != values[4]


def test_list_reads_no_run_with_torch_or_pandas(made: Path, checkout: Path) -> None:
    code = "import sys; from esper.app import main; main(['list', sys.argv[1]]); print(*sys.modules, file=sys.stderr)"
    environment = os.environ | {"PYTHONPATH": str(checkout)}
    command = [sys.executable, "-c", code, f"output={made}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert not {"torch", "mlflow", "pandas", "numpy", "redis", "hydra", "rich"} & set(done.stderr.split())
