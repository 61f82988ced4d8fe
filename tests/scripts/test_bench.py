"""``scripts/bench``: finds benchmarks by name; the step benchmark compares real loops."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from contextlib import chdir
from pathlib import Path
from typing import Any

import pytest

from scripts.benchmarks.__main__ import main as benchmarks
from scripts.benchmarks._baseline import Spread, regressions
from tests.here import called

pytestmark = pytest.mark.usefixtures("heavy_libraries")


def _bench(checkout: Path, *words: str) -> subprocess.CompletedProcess[str]:
    with chdir(checkout):
        return called(benchmarks, *words)


@pytest.mark.usefixtures("processes")
def test_without_a_name_it_lists_what_there_is(checkout: Path) -> None:
    command = [sys.executable, "-m", "scripts.benchmarks"]
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0
    for name in (
        "calls",
        "library",
        "lora",
        "step",
        "million",
        "controllers",
        "start",
        "tracking",
        "kernels",
        "counts",
        "checkpoint",
        "cluster",
    ):
        assert f"\n  {name} " in done.stdout


def test_an_unknown_name_and_an_unknown_host_are_refused_in_words(checkout: Path) -> None:
    done = _bench(checkout, "stpe")
    assert done.returncode == 2 and "There is no benchmark 'stpe'" in done.stderr
    done = _bench(checkout, "step", "--hosts", "rnn")
    assert done.returncode == 2 and "There is no host 'rnn'; there are mlp, cnn, wide cnn, small." in done.stderr


@pytest.mark.parametrize("arm", ["dormant, telemetry", "10 % grafting, chunk", "10 % training"])
def test_every_row_says_where_it_was_measured(checkout: Path, tmp_path: Path, arm: str) -> None:
    out = tmp_path / "step.csv"
    done = _bench(checkout, "step", "--hosts", "small", "--pairs", "2", "--steps", "3", "--arms", arm, "--out", str(out))
    assert done.returncode in (0, 1), done.stderr
    (row,) = csv.DictReader(out.open(encoding="utf-8"))
    assert row["arm"].startswith(arm) and float(row["ratio"]) > 0 and float(row["p20_ms"]) <= float(row["p80_ms"])
    assert row["device"].startswith("cpu") and row["torch"] and row["python"]


def test_a_smaller_multitude_of_seeds_goes_the_same_way(checkout: Path, tmp_path: Path) -> None:
    done = _bench(checkout, "million", "--seeds", "6400", "--ticks", "5", "--out", str(tmp_path / "rows.csv"))
    assert done.returncode in (0, 1), done.stdout + done.stderr  # 1: slower than the limit, as a busy machine may be
    assert done.stdout.count("56 bytes a seed") == 2


def test_a_few_sites_measure_every_controller_the_same_way(checkout: Path) -> None:
    done = _bench(checkout, "controllers", "--sites", "3", "--seeds", "20", "--ticks", "12")
    assert done.returncode in (0, 1), done.stdout + done.stderr  # 1: slower than the limit, as a busy machine may be
    for name in ("heuristic", "bandit", "policy", "hierarchical"):
        assert f"{name} " in done.stdout and f"{name} decided nothing" not in done.stdout


def _told(checkout: Path, file: Path, name: str) -> dict[str, Any]:
    """What a brief run of a benchmark prints and writes, which are the same."""
    done = _bench(checkout, name, "--quick", "--json", str(file))
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    assert json.loads(done.stdout) == found
    assert {"system", "cores", "load", "threads", "python", "torch", "transformers"} <= found["machine"].keys()
    return found


def test_seeds_and_lora_learn_with_as_many_parameters_on_one_host(checkout: Path, tmp_path: Path) -> None:
    found = _told(checkout, tmp_path / "lora.json", "lora")
    lora, seeds = (found["median"][arm] for arm in ("lora", "seeds"))
    assert found["machine"]["peft"] and [row["arm"] for row in found["rows"]] == ["lora", "seeds"]
    assert seeds["parameters"] == pytest.approx(lora["parameters"], rel=0.03) and 0 < lora["parameters"] < found["host"] / 2
    assert max(lora["loss"], seeds["loss"]) < found["host_loss"] and min(lora["kept_kib"], seeds["kept_kib"]) > 0


def test_the_librarys_own_speed_is_measured_on_models_that_agree(checkout: Path, tmp_path: Path) -> None:
    found = _told(checkout, tmp_path / "library.json", "library")
    assert [row["rows"] for row in found["forward"]] == [256, 4096] and all(row["ratio"] > 0 for row in found["forward"])
    assert found["attach"]["sites"] == 2 and len(found["attach"]["seconds"]) == 2


def test_a_check_fails_where_the_committed_baseline_was_clearly_better(checkout: Path, tmp_path: Path) -> None:
    baseline = tmp_path / "baseline.csv"
    baseline.write_text('host,arm,ratio_p20,ratio_p80\nsmall,"10 % training (shadow), chunk",0.1,0.2\n', encoding="utf-8")
    words = ("step", "--hosts", "small", "--pairs", "2", "--steps", "3", "--arms", "10 % training", "--out", str(tmp_path / "step.csv"))
    done = _bench(checkout, *words, "--check", "--baseline", str(baseline))
    assert done.returncode == 1, done.stderr
    assert "small, 10 % training (shadow), chunk: " in done.stdout and "and the baseline has 0.100 to 0.200" in done.stdout
    done = _bench(checkout, *words[:3], "--check", "--baseline", str(tmp_path / "nothing.csv"))
    assert done.returncode == 2 and "there is no such file" in done.stderr


def test_a_spread_that_overlaps_with_the_baseline_is_no_regression() -> None:
    then = {"a": Spread.of([1.0, 1.1, 1.2, 1.3, 1.4]), "gone": Spread(1.0, 1.0)}
    assert regressions({"a": Spread.of([1.3, 1.4, 1.5, 1.9, 2.0]), "new": Spread(9.0, 9.0)}, then) == []
    (sentence,) = regressions({"a": Spread.of([1.7, 1.8, 1.9])}, then)
    assert sentence.startswith("a: 1.740 to 1.860, and the baseline has 1.080 to 1.320")


def test_a_part_of_the_cluster_measured_anew_keeps_the_rows_of_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from scripts.benchmarks import cluster

    out = tmp_path / "cluster.csv"
    ratios = iter([1.2, 1.05])
    monkeypatch.setattr(cluster, "bus_rates", lambda: [cluster.Row("bus, raw", 3.0e6, "seed-records/s", "one core")])
    monkeypatch.setattr(
        cluster,
        "launchers",
        lambda *given: [cluster.Row("sweep, processor time, ray ÷ local", next(ratios), "×", f"{given[0]} short jobs")],
    )
    assert cluster.main(["--only", "bus", "--out", str(out)]) == 0
    assert cluster.main(["--only", "launchers", "--jobs", "8", "--out", str(out)]) == 1, "a tenth is the limit"
    assert cluster.main(["--only", "launchers", "--jobs", "64", "--out", str(out)]) == 0
    rows = list(csv.DictReader(out.open(encoding="utf-8")))
    assert [(row["measure"], float(row["value"])) for row in rows] == [("bus, raw", 3.0e6), ("sweep, processor time, ray ÷ local", 1.05)]
    assert all(row["load"] and int(row["cores"]) and row["ray"] and row["mlflow"] for row in rows)


def test_rows_are_counted_from_the_database_that_they_were_written_to(checkout: Path, tmp_path: Path, processes: None) -> None:
    from scripts.benchmarks import cluster

    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    assert cluster.rate_of(uri, 1, 1) > 0
    size, count = cluster.bytes_and_rows(uri)
    assert count == 2000, "one batch before, and one that is measured"
    assert size == (tmp_path / "mlflow.db").stat().st_size
