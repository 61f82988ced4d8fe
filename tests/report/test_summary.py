"""summary.json: deterministic, whole or absent, readable by any JSON parser."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from esper.report.summary_file import plain, read_summary, write_summary


def test_the_same_summary_gives_the_same_bytes_whatever_the_order_of_its_keys(tmp_path: Path):
    first = write_summary({"b": 1.5, "a": {"y": 2, "x": [1, 2]}}, tmp_path).read_bytes()
    second = write_summary({"a": {"x": (1, 2), "y": 2}, "b": 1.5}, tmp_path).read_bytes()
    assert first == second


def test_numbers_that_are_not_finite_become_null(tmp_path: Path):
    write_summary({"gain": math.nan, "best": [math.inf, -math.inf, 1.0]}, tmp_path)
    assert read_summary(tmp_path) == {"gain": None, "best": [None, None, 1.0]}


def test_scalars_of_numpy_and_torch_and_paths_are_plain():
    given = {"a": np.float32(0.5), "b": torch.tensor(3), "c": Path("x/y"), "d": {2, 1}, 5: True, "n": np.float64("nan")}
    assert plain(given) == {"a": 0.5, "b": 3, "c": "x/y", "d": [1, 2], "5": True, "n": None}


def test_an_object_is_refused_by_name():
    with pytest.raises(TypeError, match="module"):
        plain({"oops": json})


def test_a_failed_write_leaves_the_old_summary(tmp_path: Path):
    write_summary({"a": 1}, tmp_path)
    with pytest.raises(TypeError):
        write_summary({"a": object()}, tmp_path)
    assert read_summary(tmp_path) == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]
