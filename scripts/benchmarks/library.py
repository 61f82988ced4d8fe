"""How fast the library is: attaching to a transformers model of 100 M parameters, and the exported model's forward.

    scripts/bench library [--json FILE]

``attach``: GPT-2 small's shape (124 M) at random weights, seeds at every hidden layer, a batch of 8 × 128 tokens as sample.
``forward``: an exported model against the same architecture written by hand, each the median of alternating rounds.
Both must give the same outputs before anything is timed.
"""

from __future__ import annotations

import argparse
import copy
import json
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
from scripts.benchmarks._machine import machine

ROUNDS, CALLS = 101, 40
SMALL = {"n_layer": 2, "n_embd": 64, "n_head": 2}


def attaching(rounds: int, shape: dict[str, int]) -> dict[str, Any]:
    """Seconds of ``attach`` on fresh seeds of one model; the first one also imports what is imported lazily."""
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(**shape))
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
    known = {"parameters": parameters, "sites": len(grow.registry.sites)}
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


def forward(rows: int, rounds: int) -> dict[str, Any]:
    """Median seconds of a forward of ``rows`` rows, exported and by hand, and their ratio."""
    loop = Loop("mlp", {1: [germinate(seed=0), germinate(seed=1)]})
    loop.until(Stage.EVALUATING)
    exported = loop.grow.export().eval()
    hand = copy.deepcopy(exported)
    hand.fc1 = ByHand(hand.fc1)
    x = torch.randn(rows, 6)
    with torch.inference_mode():
        assert torch.allclose(exported(x), hand(x), atol=1e-6), "the two models differ: nothing to time"
        mine, theirs = _alternating(lambda: exported(x), lambda: hand(x), rounds)
    return {"rows": rows, "exported_us": mine * 1e6, "by_hand_us": theirs * 1e6, "ratio": mine / theirs}


def _alternating(first: Callable[[], Tensor], second: Callable[[], Tensor], rounds: int) -> tuple[float, float]:
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for function, spent in zip((first, second), times, strict=True):
            began = time.process_time()
            for _ in range(CALLS):
                function()
            spent.append((time.process_time() - began) / CALLS)
    return statistics.median(times[0]), statistics.median(times[1])


def main(arguments: list[str]) -> int:
    """Measure both and print them; ``--json FILE`` keeps them."""
    parser = argparse.ArgumentParser(prog="scripts/bench library", description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a small model and few rounds: a look, not a result")
    parser.add_argument("--json", type=Path, help="write what is printed to this file")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rounds, shape = (3, SMALL) if options.quick else (ROUNDS, {})
    found = {"forward": [forward(rows, rounds) for rows in (256, 4096)], "attach": attaching(2 if options.quick else 5, shape)}
    text = json.dumps({"machine": machine("transformers"), **found}, indent=1)
    print(text)
    if options.json is not None:
        options.json.write_text(text + "\n", encoding="utf-8")
    return 0
