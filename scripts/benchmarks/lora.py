"""Seeds on a pretrained, frozen host beside LoRA (``peft``): same host, same data, same number of parameters that learn.

    scripts/bench lora [--seeds 3] [--steps 600] [--json FILE]

The host is a tiny GPT-2 that first learns progressions modulo 30 with steps 1–3; then it is frozen and adapted to steps 4–6.
Told as JSON, a row an arm and seed, and the medians: held-out loss, milliseconds a step (process time), parameters, and the largest
memory of the tensors that a step's forward keeps for its backward.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from esper import attach
from esper.blueprints import LowRank
from esper.controllers import CONFIGS
from esper.engine.learning.branch_optimizer import BranchLearning
from esper.lifecycle import LifecycleConfig
from scripts.benchmarks._machine import machine

MODULO, LENGTH, BATCH, RANK, RATE = 30, 12, 32, 8, 3e-3
Batch = dict[str, torch.Tensor]


def progressions(count: int, steps: tuple[int, int], seed: int) -> Batch:
    """``count`` arithmetic progressions whose step lies in ``steps``; what follows the second number is determined."""
    draws = torch.Generator().manual_seed(seed)
    first = torch.randint(0, MODULO, (count, 1), generator=draws)
    step = torch.randint(steps[0], steps[1] + 1, (count, 1), generator=draws)
    ids = (first + step * torch.arange(LENGTH)) % MODULO
    return {"input_ids": ids, "labels": ids}


def pretrained(steps: int) -> GPT2LMHeadModel:
    """The host, after learning steps 1–3."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(n_layer=2, n_embd=32, n_head=2, n_positions=LENGTH, vocab_size=MODULO, bos_token_id=0, eos_token_id=0)
    )
    optimizer = torch.optim.AdamW(model.parameters(), RATE)
    for number in range(steps):
        model(**progressions(BATCH, (1, 3), 10_000 + number)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.requires_grad_(False)


def held_out(model: nn.Module) -> float:
    """Loss in nats a token on new progressions of steps 4–6."""
    model.eval()
    with torch.no_grad():
        loss = float(model(**progressions(512, (4, 6), 77)).loss)
    model.train()
    return loss


def with_lora(host: GPT2LMHeadModel, steps: int, seed: int) -> dict[str, Any]:
    """LoRA of rank RANK on the same layers."""
    torch.manual_seed(seed)
    model = get_peft_model(copy.deepcopy(host), LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["c_fc"], fan_in_fan_out=True))
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, RATE)

    def step(batch: Batch) -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    spent, kept = timed(step, steps, seed)
    return {"arm": "lora", "parameters": sum(p.numel() for p in learning), "loss": held_out(model), "step_ms": spent, "kept_kib": kept}


def with_seeds(host: GPT2LMHeadModel, steps: int, seed: int, rank: int) -> dict[str, Any]:
    """A seed at each of the same layers, ``low_rank`` of ``rank``, germinated at once and judged as ever."""
    torch.manual_seed(seed)
    model = copy.deepcopy(host)
    grow = attach(
        model,
        judge=[progressions(8, (4, 6), 500_000 + number) for number in range(64)],
        sites="mlp_hidden",
        per_site=1,
        blueprint=LowRank(rank=rank),
        lifecycle=LifecycleConfig(readiness=-1.0, stability=0.0),
        learning=BranchLearning(lr=RATE),
        controller=CONFIGS["scheduled"](script=[{"at": "1step", "command": "germinate", "site": "*", "count": 9}]),
        total_steps=steps,
        seed=seed,
        count_macs=False,
    )

    def step(batch: Batch) -> None:
        loss = model(**batch).loss
        loss.backward()
        grow.after_backward(batch, loss.detach())
        grow.tick(loss.detach())

    spent, kept = timed(step, steps, seed)
    branches = grow.registry.branches.living()
    told = {"parameters": sum(branch.parameters for branch in branches), "kept": grow.transitions.counts["fossilized"]}
    return {"arm": "seeds", **told, "loss": held_out(grow.export()), "step_ms": spent, "kept_kib": kept}


def timed(step: Callable[[Batch], None], steps: int, seed: int) -> tuple[float, float]:
    """(mean milliseconds of process time a step, KiB that the heaviest step's forward kept for its backward)."""
    batches = [progressions(BATCH, (4, 6), seed * 100_000 + number) for number in range(steps)]
    largest = 0
    began = time.process_time()
    for number, batch in enumerate(batches):
        if number % 50 == 49:
            held: dict[int, int] = {}

            def keep(tensor: torch.Tensor, held: dict[int, int] = held) -> torch.Tensor:
                storage = tensor.untyped_storage()
                held[storage.data_ptr()] = storage.nbytes()
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                step(batch)
            largest = max(largest, sum(held.values()))
        else:
            step(batch)
    return (time.process_time() - began) / steps * 1e3, largest / 1024


def compared(seeds: int, steps: int) -> dict[str, Any]:
    """Both arms over the seeds, and their medians."""
    host = pretrained(steps)
    width, hidden = host.config.n_embd, 4 * host.config.n_embd
    rank = round(RANK * (width + hidden) / (2 * hidden))  # a seed reads the layer's output, LoRA its input: fewer numbers a rank
    rows = [arm for seed in range(1, seeds + 1) for arm in (with_lora(host, steps, seed), with_seeds(host, steps, seed, rank))]
    told = ("parameters", "loss", "step_ms", "kept_kib")
    medians = {arm: {key: statistics.median(row[key] for row in rows if row["arm"] == arm) for key in told} for arm in ("lora", "seeds")}
    before = {"host": sum(p.numel() for p in host.parameters()), "host_loss": held_out(host)}
    return {"seeds": seeds, "steps": steps, **before, "median": medians, "rows": rows}


def main(arguments: list[str]) -> int:
    """Train both arms and print what came of them; ``--json FILE`` keeps it."""
    parser = argparse.ArgumentParser(prog="scripts/bench lora", description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--quick", action="store_true", help="one seed, 60 steps: a look, not a result")
    parser.add_argument("--json", type=Path, help="write what is printed to this file")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    found = compared(*((1, 60) if options.quick else (options.seeds, options.steps)))
    text = json.dumps({"machine": machine("transformers", "peft"), **found}, indent=1)
    print(text)
    if options.json is not None:
        options.json.write_text(text + "\n", encoding="utf-8")
    return 0
