"""Do ranks that grow under the judge adapt a frozen transformer better than peft's own LoRA with as many parameters?

python experiments/adapters/run.py            # the whole study: tuning.csv, runs.csv, the verdicts, the figure, the README
python experiments/adapters/run.py --short    # one change, eight pairs, one tuning seed
python experiments/adapters/run.py --quick --out try
python experiments/adapters/run.py --again    # verdicts, figure and table once more from the files
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent)]

from second_training import falling  # noqa: E402
from small_study import RATES, Study  # noqa: E402
from study_runs import Row, TimeLimit, best, carry_out, job, note_machine, tuning_jobs  # noqa: E402

LAYERS = tuple(f"transformer.h.{block}.{layer}" for block in (0, 1) for layer in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"))
MODULO, LENGTH, BATCH = 30, 12, 32
JUDGED = 32
"""Batches of eight sequences by which ranks are judged."""
RANK, MOST = 2, 6
"""Ranks of one seed of ``grown``, and the most that a layer may have: those of a seed of ``shrunk``, and of peft's arms in their tuning."""
WAVES = {"grown": ("2%", "30%", "60%"), "shrunk": ("2%",)}
Batch = dict[str, Tensor]


def sequences(change: str, count: int, seed: int) -> Batch:
    """Sequences modulo MODULO of which two numbers determine the rest.

    ``before``: steps of 1 to 3, which the host knows; ``steps``: of 4 to 6; ``doubling``: twice the number before and 1 to 3 more.
    """
    draws = torch.Generator().manual_seed(seed)
    number = torch.randint(0, MODULO, (count, 1), generator=draws)
    step = torch.randint(1, 4, (count, 1), generator=draws) + (3 if change == "steps" else 0)
    found = [number]
    for _ in range(LENGTH - 1):
        found.append(((2 if change == "doubling" else 1) * found[-1] + step) % MODULO)
    ids = torch.cat(found, 1)
    return {"input_ids": ids, "labels": ids}


def host(steps: int, seed: int) -> nn.Module:
    """A tiny GPT-2 that has learnt steps of 1 to 3, frozen."""
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        sizes = {"n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": LENGTH, "vocab_size": MODULO}
        made: Any = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0))
    optimizer = torch.optim.AdamW(made.parameters(), 3e-3)
    for number in range(steps):
        made(**sequences("before", BATCH, seed * 1_000_003 + number)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    frozen: nn.Module = made.requires_grad_(False)
    return frozen


@torch.no_grad()
def loss_on(model: nn.Module, change: str, seed: int) -> float:
    """Nats a token on 1,024 new sequences."""
    return float(model(**sequences(change, 1024, seed)).loss)


def one(given: Row) -> Row:
    """Adapt a host to the change by the arm; its loss on new sequences, and the ranks of every layer."""
    arm, change, seed, steps, settings = (given[name] for name in ("arm", "block", "seed", "steps", "settings"))
    model = host(steps, seed)
    data = [sequences(change, BATCH, seed * 1_000_003 + 500_000 + number) for number in range(steps)]
    before = loss_on(model, "before", 77)
    if arm in WAVES:
        model, found = grown(arm, model, change, data, settings["lr"], seed)
    elif arm == "nothing":
        found = {}
    else:
        found = settings.get("ranks") or dict.fromkeys(LAYERS, MOST)
        model = adapted(model, data, settings["lr"], found, seed)
    sizes = {name: sum(model.get_submodule(name).weight.shape) for name in LAYERS} if arm != "nothing" else {}
    added = sum(rank * sizes[name] for name, rank in found.items())
    measured = {"loss": loss_on(model, change, 78), "judge": -loss_on(model, change, 79), "added": added}
    told = {f"rank.{name.removeprefix('transformer.h.')}": found.get(name, 0) for name in LAYERS}
    return {**measured, "before_old": before, "after_old": loss_on(model, "before", 77), **told}


def grown(arm: str, model: nn.Module, change: str, data: list[Batch], lr: float, seed: int) -> tuple[nn.Module, dict[str, int]]:
    """Three waves of RANK ranks at every layer, each judged as it comes (``grown``), or one of MOST that learns nearly to the end."""
    from peft import LoraConfig

    from esper import attach
    from esper.controllers import CONFIGS
    from esper.engine.learning.branch_optimizer import BranchLearning
    from esper.integrations.peft import lora_lifecycle, lora_settings, ranks

    rank = RANK if arm == "grown" else MOST
    life = lora_lifecycle() if arm == "grown" else lora_lifecycle(fine_tuning_min="75%", fine_tuning_max="85%")
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(LAYERS), fan_in_fan_out=True)
    settings = lora_settings(model, config, lifecycle=life)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)  # of the frozen host: the ranks follow its schedule
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: falling(step, len(data)))
    judge = [sequences(change, 8, seed * 1_000_003 + 900_000 + number) for number in range(JUDGED)]
    grow = attach(
        model,
        **settings,
        judge=judge,
        optimizer=optimizer,
        learning=BranchLearning(lr=lr, weight_decay=0.0),
        controller=CONFIGS["scheduled"](script=[{"at": time, "command": "germinate", "site": "*"} for time in WAVES[arm]]),
        total_steps=len(data),
        seed=seed,
        count_macs=False,
    )
    for batch in data:
        loss = model(**batch).loss
        loss.backward()
        grow.after_backward(batch, loss.detach())
        optimizer.step()
        schedule.step()
        grow.tick(loss.detach())
    grow.close()
    return grow.export(), ranks(grow)


def adapted(model: nn.Module, data: list[Batch], lr: float, found: dict[str, int], seed: int) -> nn.Module:
    """peft's LoRA with these ranks, trained on the same batches at the same scaling, merged into the host."""
    from peft import LoraConfig, get_peft_model

    given = {name: rank for name, rank in found.items() if rank}
    config = LoraConfig(r=1, target_modules=list(given), rank_pattern=given, alpha_pattern=given, fan_in_fan_out=True)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        lora: Any = get_peft_model(model, config)
    learning = [parameter for parameter in lora.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: falling(step, len(data)))
    for batch in data:
        lora(**batch).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    merged: nn.Module = lora.merge_and_unload()
    return merged


def ranks_for(arm: str, row: Row) -> dict[str, int]:
    """The ranks with which an arm of peft's follows a grown run: its own, or the same at all layers for as many parameters."""
    own = {name: int(row[f"rank.{name.removeprefix('transformer.h.')}"]) for name in LAYERS}
    if arm == "same_ranks":
        return own
    one_rank = host_sizes()
    return dict.fromkeys(LAYERS, max(1, round(row["added"] / sum(one_rank.values()))))


def host_sizes() -> dict[str, int]:
    """Parameters of one rank at each layer."""
    made = host(0, 0)
    return {name: sum(made.get_submodule(name).weight.shape) for name in LAYERS}


@dataclass(frozen=True)
class Following(Study):
    """A study in which peft's arms follow the grown run of their pair: they are given its number of parameters."""

    def _run(self, options: argparse.Namespace) -> None:
        limit, quick = TimeLimit(options.minutes), options.quick
        note_machine(options.out, options.workers)
        steps = 100 if quick else self.steps
        grid = [{"lr": rate} for rate in (RATES[1:3] if quick else RATES)]
        jobs = tuning_jobs({"grown": grid, "shrunk": grid, "uniform": grid}, self.blocks, 1 if quick else self.tune_seeds, steps=steps)
        chosen = best(carry_out(one, jobs, options.out / "tuning.csv", options.workers, limit), "judge")
        chosen |= {("same_ranks", block): chosen["uniform", block] for block in self.blocks if ("uniform", block) in chosen}
        pairs = [(block, seed) for seed in range(2 if quick else self.seeds) for block in self.blocks]
        first = [
            job(arm, block, seed, chosen.get((arm, block), {"lr": 0.0}), steps=steps)
            for block, seed in pairs
            for arm in ("grown", "shrunk", "nothing")
        ]
        rows = carry_out(one, first, options.out / "grown.csv", options.workers, limit)
        following = [
            job(arm, row["block"], row["seed"], {**chosen[arm, row["block"]], "ranks": ranks_for(arm, row)}, steps=steps)
            for row in rows
            if row["arm"] == "grown" and row["added"]
            for arm in ("uniform", "same_ranks")
        ]
        carry_out(one, following, options.out / "peft.csv", options.workers, limit)
        parts = [(options.out / name).read_text(encoding="utf-8") for name in ("grown.csv", "peft.csv")]
        (options.out / "runs.csv").write_text(parts[0] + parts[1].partition("\n")[2], encoding="utf-8")
        for name in ("grown.csv", "peft.csv"):
            (options.out / name).unlink()


STUDY = Following(
    folder=HERE,
    one=one,
    arms=("uniform", "same_ranks", "grown", "shrunk", "nothing"),
    untuned=("nothing",),
    blocks=("steps", "doubling"),
    metrics={"loss": "min"},
    costs=("added",),
    reference="uniform",
    effect=0.02,
    steps=300,
    seeds=10,
    tune_seeds=2,
)

SHORT = replace(STUDY, blocks=("steps",), seeds=8, tune_seeds=1)

if __name__ == "__main__":
    short = "--short" in sys.argv
    sys.exit((SHORT if short else STUDY).main([word for word in sys.argv[1:] if word != "--short"]))
