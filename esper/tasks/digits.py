"""Handwritten digits: 1,797 real 8×8 images that come with scikit-learn."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import torch

from esper.errors import UserError
from esper.tasks.base import Task
from esper.tasks.classification import classification, divide
from esper.tasks.config import DigitsConfig


def build(config: DigitsConfig) -> Task:
    """Read the images from the scikit-learn wheel (UCI optical digits, pixels 0–16).

    The file alone: importing scikit-learn would take longer than everything else before the first step.
    """
    import numpy as np

    table = torch.from_numpy(np.loadtxt(_file(), delimiter=",", dtype=np.int64))
    pool = table[:, :-1].to(torch.uint8).reshape(-1, 1, 8, 8), table[:, -1].contiguous()
    wanted = {"train": config.train, "judge": config.judge, "validation": config.validation, "test": config.test}
    sets = divide(config.name, pool, config.split_seed, wanted)
    return classification(config.name, sets, 10, "handwritten digits (UCI, from scikit-learn), 8×8 grey")


def _file() -> Path:
    """Lines of 64 pixels and a label. Raises UserError where scikit-learn is not installed or has no such file any more."""
    found = find_spec("sklearn")
    folders = [] if found is None else list(found.submodule_search_locations or ())
    for folder in folders:
        path = Path(folder) / "datasets" / "data" / "digits.csv.gz"
        if path.exists():
            return path
    raise UserError("task=digits reads digits.csv.gz from scikit-learn, which is not there; run: pip install scikit-learn.")
