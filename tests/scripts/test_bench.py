"""``scripts/bench``: finds benchmarks by name; the step benchmark compares real loops."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pytest


def _bench(checkout: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "scripts.benchmarks", *words]
    return subprocess.run(command, cwd=checkout, capture_output=True, text=True, timeout=120, check=False)


def test_without_a_name_it_lists_what_there_is(checkout: Path) -> None:
    done = _bench(checkout)
    assert done.returncode == 0
    for name in ("step", "million", "start", "tracking", "kernels"):
        assert f"\n  {name} " in done.stdout


def test_an_unknown_name_and_an_unknown_host_are_refused_in_words(checkout: Path) -> None:
    done = _bench(checkout, "stpe")
    assert done.returncode == 2 and "There is no benchmark 'stpe'" in done.stderr
    done = _bench(checkout, "step", "--hosts", "rnn")
    assert done.returncode == 2 and "There is no host 'rnn'; there are mlp, cnn, small." in done.stderr


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
