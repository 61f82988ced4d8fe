"""The report of the study of `esper auto`: the oracle is chosen on the test set, the settings of a size on validation."""

from __future__ import annotations

import csv
import importlib.util
import json
import sys
from itertools import product
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture
def report(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The study's report as a module."""
    path = checkout / "experiments" / "auto_size"
    monkeypatch.syspath_prepend(str(path))
    spec = importlib.util.spec_from_file_location("auto_size_report", path / "report.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def write(folder: Path, auto: float) -> None:
    """Two pairs of wines: size 64 is the best on the test set with rate 0.01, which validation prefers; a third pair lacks runs."""
    rows = []
    for pair, size, rate, length in product(range(3), ("16", "32", "64", "128", "256"), (0.001, 0.003, 0.01), (0.25, 1.0)):
        validation = 0.8 + rate + 0.01 * length
        test = (0.95 if size == "64" else 0.9) if rate == 0.01 else 0.99  # what validation does not choose is not seen
        found = {"kind": "static", "name": "wine", "pair": pair, "size": size, "rate": rate, "length": length}
        rows.append(found | {"validation": validation, "test": test, "parameters": 10 * int(size), "macs": 100})
    rows = [row for row in rows if not (row["pair"] == 2 and row["size"] == "256")]
    for pair in range(3):
        rows.append({"kind": "auto", "name": "wine", "pair": pair, "validation": 0.9, "test": auto, "parameters": 320, "macs": 1200})
        rows.append({"kind": "boosting", "name": "wine", "pair": pair, "validation": 0.9, "test": 0.92, "attempts": 40})
    with (folder / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)
    about = {"planned": 99, "made": len(rows), "failed": 0, "minutes": 1.0, "processes": 2}
    (folder / "about.json").write_text(json.dumps(about | {"python": "3", "machine": "m", "torch": "2", "sklearn": "1"}))


@pytest.mark.parametrize(("auto", "within"), [(0.946, "yes"), (0.944, "no, not on `wine` (-0.60)")])
def test_the_oracle_is_the_best_size_on_the_test_set(report: ModuleType, tmp_path: Path, auto: float, within: str) -> None:
    write(tmp_path, auto)
    report.write_report(tmp_path)
    said = " ".join((tmp_path / "README.md").read_text().split())
    assert f"Within 0.5 point of the oracle on every data set: {within}" in said
    assert f"| `wine` | 2 | 64 | 640 | 95.00 | 90.00 | {100 * auto:.2f} | 320 |" in said, "only pairs with a whole grid count"
    assert "yes, by both means (0.50 times" in said and "At most half of the grid's MACs: yes (40%)" in said
    assert "On 1 of 1 tables auto is ahead" in said and (tmp_path / "sizes.png").stat().st_size > 5_000
