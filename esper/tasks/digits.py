"""Handwritten digits: 1,797 real 8×8 images that come with scikit-learn."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

from esper.errors import UserError
from esper.fields import setting
from esper.tasks.base import Task
from esper.tasks.classification import classification, divide


@dataclass
class DigitsConfig:
    """The default task: 1,000 / 250 / 250 / 297 images, 10 classes."""

    name: str = "digits"
    split_seed: int = setting(0, low=0, help="decides which sample is in which set, whatever the run's seed")
    train: int = setting(0, low=0, high=1797, unit="samples", help="training samples; 0 takes all that are left")
    judge: int = setting(250, low=10, high=1797, unit="samples", help="samples that gates are decided on")
    validation: int = setting(250, low=10, high=1797, unit="samples", help="samples of the curves")
    test: int = setting(297, low=10, high=1797, unit="samples", help="samples touched once, at the end")

    def build(self) -> Task:
        """Read the images from the scikit-learn wheel (UCI optical digits, pixels 0–16).

        The file alone: importing scikit-learn would take longer than everything else before the first step.
        """
        import numpy as np

        table = torch.from_numpy(np.loadtxt(_file(), delimiter=",", dtype=np.int64))
        pool = table[:, :-1].to(torch.uint8).reshape(-1, 1, 8, 8), table[:, -1].contiguous()
        wanted = {"train": self.train, "judge": self.judge, "validation": self.validation, "test": self.test}
        sets = divide(self.name, pool, self.split_seed, wanted)
        return classification(self.name, sets, 10, "handwritten digits (UCI, from scikit-learn), 8×8 grey")


def _file() -> Path:
    """Lines of 64 pixels and a label. Raises UserError where scikit-learn is not installed or has no such file any more."""
    found = find_spec("sklearn")
    folders = [] if found is None else list(found.submodule_search_locations or ())
    for folder in folders:
        path = Path(folder) / "datasets" / "data" / "digits.csv.gz"
        if path.exists():
            return path
    raise UserError("task=digits reads digits.csv.gz from scikit-learn, which is not there; run: pip install scikit-learn.")
