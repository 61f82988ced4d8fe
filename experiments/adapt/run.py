"""How well do seeds adapt a trained net to new data, and how much does it forget?

python experiments/adapt/run.py            # the whole study: tuning.csv, runs.csv, the verdicts, the figure, the README
python experiments/adapt/run.py --quick --out try
python experiments/adapt/run.py --again    # verdicts, figure and table once more from the files
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent)]

from second_training import Batch, Data, accuracy, digits, second_training, trained_host  # noqa: E402
from small_study import Study  # noqa: E402
from study_runs import Row  # noqa: E402

UNITS = 24
NEW = 8
"""The first of the two classes that are new."""


def rotated(inputs: Tensor, labels: Tensor) -> Batch:
    """A quarter turn."""
    return inputs.view(-1, 8, 8).rot90(1, (1, 2)).reshape(-1, 64), labels


def inverted(inputs: Tensor, labels: Tensor) -> Batch:
    """Black is white."""
    return -inputs, labels


def _only(chosen: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Batch]:
    return lambda inputs, labels: (inputs[chosen(labels)], labels[chosen(labels)])


def old_and_new(change: str, data: Data) -> tuple[Data, Data]:
    """The data of the first training and those of the second."""
    if change == "new_classes":
        return data.changed(_only(lambda labels: labels < NEW)), data.changed(_only(lambda labels: labels >= NEW))
    return data, data.changed({"rotated": rotated, "inverted": inverted}[change])


CHANGES = ("rotated", "inverted", "new_classes")
ARMS = ("seeds", "judged", "seeds_replay", "lora", "head", "fine_tune", "fine_tune_replay", "nothing")
REPLAYED = 100
"""Old samples that the arms with replay see again, of about 1,000."""


def with_replay(new: Data, old: Data) -> Data:
    """The new training data and the first of the old ones, these repeated so that either are about as many."""
    times = max(1, len(new.train[1]) // REPLAYED)
    parts = [
        torch.cat([mine, theirs[:REPLAYED].repeat(times, *[1] * (theirs.dim() - 1))])
        for mine, theirs in zip(new.train, old.train, strict=True)
    ]
    return replace(new, train=(parts[0], parts[1]))


def one(given: Row) -> Row:
    """A host is trained on the old data, then on the new ones alone, and measured on both."""
    seed, steps, arm = given["seed"], given["steps"], given["arm"]
    old, new = old_and_new(given["block"], digits(seed))
    host: nn.Module = trained_host(old.train, 2 * steps, seed)
    before = accuracy(host, old.test)
    data = with_replay(new, old) if arm.endswith("_replay") else new
    net, added = second_training(arm.removesuffix("_replay"), host, data, given["settings"]["lr"], UNITS, steps, seed)
    after = accuracy(net, old.test)
    names = {"accuracy": accuracy(net, new.test), "forgetting": before - after, "judge": accuracy(net, new.judge)}
    return {**names, "old_before": before, "old_after": after, "added": added}


STUDY = Study(
    folder=HERE,
    one=one,
    arms=ARMS,
    untuned=("nothing",),
    blocks=CHANGES,
    metrics={"accuracy": "max", "forgetting": "min"},
    costs=("added",),
    reference="fine_tune",
    effect=0.005,
)

if __name__ == "__main__":
    sys.exit(STUDY.main(sys.argv[1:]))
