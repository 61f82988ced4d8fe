"""How fast the library is: attaching to a transformers model of 100 M parameters, and the exported model's forward.

    python scripts/benchmarks/library.py

``attach``: GPT-2 small's shape (124 M) at random weights, seeds at every hidden layer, a batch of 8 × 128 tokens as sample.
``forward``: an exported model against the same architecture written by hand, each the median of alternating rounds.
Both must give the same outputs before anything is timed.
"""

from __future__ import annotations

import copy
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

from growing import Loop, germinate  # the hosts and the loop that the tests grow

from esper import attach
from esper.lifecycle import Stage

ROUNDS, CALLS = 101, 40


def attaching(rounds: int = 5) -> dict[str, Any]:
    """Seconds of ``attach`` on fresh seeds of one model; the first one also imports what is imported lazily."""
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config())
    ids = torch.randint(0, 50000, (8, 128))
    batch = {"input_ids": ids, "labels": ids}
    seconds, busy = [], []
    for _ in range(rounds):
        began, spent = time.perf_counter(), time.process_time()
        grow = attach(model, judge=[batch], sites="mlp_hidden", total_steps=10_000)
        seconds.append(time.perf_counter() - began)
        busy.append(time.process_time() - spent)
        model = grow.export()
    parameters = sum(p.numel() for p in model.parameters())
    known = {"parameters": parameters, "sites": len(grow.garden.sites)}
    return {**known, "seconds": seconds, "median_s": statistics.median(seconds), "median_cpu_s": statistics.median(busy)}


class ByHand(nn.Module):
    """The grown layer as one would write it: a linear layer and a perceptron for each of its two halves."""

    def __init__(self, site: Any) -> None:
        super().__init__()
        sizes = site.branches.sizes
        self.linear = site.module
        self.in1, self.in2 = (nn.Linear(site.module.out_features, size) for size in sizes)
        self.out1, self.out2 = site.branches.lasts
        self.cut = site.bounds[0][1]
        parts = zip((self.in1, self.in2), site.branches.first.weight.split(sizes), site.branches.first.bias.split(sizes), strict=True)
        with torch.no_grad():
            for layer, weight, bias in parts:
                layer.weight.copy_(weight)
                layer.bias.copy_(bias)

    def forward(self, inputs: Tensor) -> Tensor:
        """``[N, 6] → [N, 8]``."""
        x = self.linear(inputs)
        left = x[..., : self.cut] + self.out1(functional.relu(self.in1(x)))
        right = x[..., self.cut :] + self.out2(functional.relu(self.in2(x)))
        return torch.cat([left, right], -1)


def forward(rows: int) -> dict[str, Any]:
    """Median seconds of a forward of ``rows`` rows, exported and by hand, and their ratio."""
    loop = Loop("mlp", {1: [germinate(seed=0), germinate(seed=1)]})
    loop.until(Stage.EVALUATING)
    exported = loop.grow.export().eval()
    hand = copy.deepcopy(exported)
    hand.fc1 = ByHand(hand.fc1)
    x = torch.randn(rows, 6)
    with torch.inference_mode():
        assert torch.allclose(exported(x), hand(x), atol=1e-6), "the two models differ: nothing to time"
        mine, theirs = _alternating(lambda: exported(x), lambda: hand(x))
    return {"rows": rows, "exported_us": mine * 1e6, "by_hand_us": theirs * 1e6, "ratio": mine / theirs}


def _alternating(first: Callable[[], Tensor], second: Callable[[], Tensor]) -> tuple[float, float]:
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(ROUNDS):
        for function, spent in zip((first, second), times, strict=True):
            began = time.process_time()
            for _ in range(CALLS):
                function()
            spent.append((time.process_time() - began) / CALLS)
    return statistics.median(times[0]), statistics.median(times[1])


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(0)
    machine = {"machine": platform.machine(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    print(json.dumps({**machine, "forward": [forward(rows) for rows in (256, 4096)], "attach": attaching()}, indent=1))
