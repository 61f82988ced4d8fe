"""``scripts/bench``: finds benchmarks by name; the step benchmark compares real loops."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.benchmarks._baseline import Spread, regressions


def _bench(checkout: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "scripts.benchmarks", *words]
    return subprocess.run(command, cwd=checkout, capture_output=True, text=True, timeout=120, check=False)


def test_without_a_name_it_lists_what_there_is(checkout: Path) -> None:
    done = _bench(checkout)
    assert done.returncode == 0
    for name in ("step", "million", "start", "tracking", "kernels", "counts", "checkpoint"):
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
    assert row["arm"].startswith(arm) and float(row["ratio"]) > 0.5 and float(row["p20_ms"]) <= float(row["p80_ms"])
    assert row["device"].startswith("cpu") and row["torch"] and row["python"]


def test_a_smaller_multitude_of_seeds_goes_the_same_way(checkout: Path, tmp_path: Path) -> None:
    done = _bench(checkout, "million", "--seeds", "6400", "--ticks", "5", "--out", str(tmp_path / "rows.csv"))
    assert done.returncode in (0, 1), done.stdout + done.stderr  # 1: slower than the limit, as a busy machine may be
    assert done.stdout.count("60 bytes a seed") == 2


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
