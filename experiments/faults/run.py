"""What the governor makes of injected faults: recovered or stopped, and the final accuracy against undisturbed runs.

Every fault is injected at three tenths of the run while branches are being blended in, over several random seeds; beside each
seed's faulty run stands its undisturbed one. Writes ``results.csv`` (``results_cuda.csv``) and the README's table.
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1])]

from esper.cli.compose import compose  # noqa: E402
from esper.engine.port import NullPort  # noqa: E402
from esper.errors import UserError  # noqa: E402
from esper.grafting import STRATEGIES  # noqa: E402
from esper.lifecycle import Stage  # noqa: E402
from esper.messages import Alert, Germinate, Message, Selector, SetStage  # noqa: E402
from esper.running.builders import build_trainer  # noqa: E402
from esper.trainer.trainer import Trainer  # noqa: E402
from scripts.benchmarks._machine import chosen  # noqa: E402

WORDS = (
    "trainer.steps=240",
    "controller=none",
    "tracking=none",
    "lifecycle.judge_every=5%",
    "telemetry.every=10",
    "grafting.ramp=30%",
    "lifecycle.grafting_max=40%",
)
RESULTS = {"cpu": "results.csv", "cuda": "results_cuda.csv"}
HOARD: list[torch.Tensor] = []
"""What fills a GPU, until the run has ended."""
FIELDS = ("fault", "seed", "outcome", "accuracy", "undisturbed", "rollbacks", "culprit_found", "alerts")


class Growing(NullPort):
    """Germinates two seeds of every site at a tenth of the run; ``approving`` asks for the next stage of every seed at every tick."""

    def __init__(self, approving: bool = False) -> None:
        self.approving, self.alerts, self.sites = approving, [], []

    def started(self, *words: Any) -> None:
        """Which seeds there are."""
        self.sites = words[2]

    def emit(self, event: Message) -> None:
        """Keep the alerts."""
        if isinstance(event, Alert):
            self.alerts.append(event.text)

    def commands(self, tick: int) -> list[Any]:
        """The germinations, and approvals."""
        if tick == 24:
            places = [(site["name"], seed) for site in self.sites for seed in range(min(2, site["seeds"]))]
            return [Germinate(id=f"g-{site}-{seed}", site=site, seed=seed) for site, seed in places]
        if not self.approving:
            return []
        return [
            SetStage(id=f"a{tick}-{stage}", select=Selector(stage=stage), target=stage + 1)
            for stage in range(int(Stage.GERMINATED), int(Stage.FOSSILIZED))
        ]


def victim(trainer: Trainer) -> Any:
    """A branch that is being blended in, with its bank."""
    branch = trainer.grow.registry.in_stage(Stage.GRAFTING)[0]
    return branch, trainer.grow.registry.layers[branch.site].bank(branch.blueprint)


def weights(trainer: Trainer) -> torch.nn.Parameter:
    """The host's first weights."""
    return trainer.optimizer.param_groups[0]["params"][0]


def nan_batch(trainer: Trainer) -> None:
    """One batch of NaN."""
    good = trainer._batch

    def bad(number: int) -> Any:
        trainer._batch = good
        return (good(number)[0] * float("nan"), *good(number)[1:])

    trainer._batch = bad


def exploding_branch(trainer: Trainer) -> None:
    """A branch's output bias at 1e30."""
    branch, bank = victim(trainer)
    with torch.no_grad():
        bank.stacks["b2"][branch.slot] = 1e30


def poisoned_gradient(trainer: Trainer) -> None:
    """NaN in the host's gradient for one step."""
    handle = weights(trainer).register_hook(lambda gradient: (handle.remove(), gradient * float("nan"))[1])


def bit_flips(trainer: Trainer) -> None:
    """The highest exponent bit of ten weights."""
    with torch.no_grad():
        weights(trainer).view(torch.int32).reshape(-1)[:10] ^= 1 << 30


def learning_rate(trainer: Trainer) -> None:
    """The learning rate times 1000 for one step."""
    for group in trainer.optimizer.param_groups:
        group["initial_lr"] *= 1000.0
    trainer.advance()
    for group in trainer.optimizer.param_groups:
        group["initial_lr"] /= 1000.0


def strategy_nan(trainer: Trainer) -> None:
    """A strategy that answers NaN for one step."""
    branch, _ = victim(trainer)
    sound = STRATEGIES[branch.strategy]
    nan = torch.tensor(float("nan"))

    def wish(*words: Any) -> Any:
        found = sound.plan(*words)
        return replace(found, advance=found.advance * nan)

    STRATEGIES[branch.strategy] = replace(sound, plan=wish)
    try:
        trainer.advance()
    finally:
        STRATEGIES[branch.strategy] = sound


def poisoned_alpha(trainer: Trainer) -> None:
    """NaN in the table of alphas itself, past every strategy."""
    branch, _ = victim(trainer)
    trainer.grow.registry.branches.alpha[branch.id] = float("nan")
    trainer.grow.registry.set_alphas({branch.site})


def full_gpu(trainer: Trainer) -> None:
    """The next step finds a GPU without a free byte; on a CPU the error of a full GPU is raised in its backward instead."""
    if trainer.device.type == "cpu":
        trainer.grow.after_backward = out_of_memory
        return
    torch.cuda.empty_cache()
    hoard, size = [], 1 << 34
    while size >= 512:
        try:
            hoard.append(torch.empty(size, dtype=torch.uint8, device=trainer.device))
        except torch.OutOfMemoryError:
            size //= 2
    HOARD.extend(hoard)


def out_of_memory(*_: Any) -> None:
    """What torch raises."""
    raise torch.OutOfMemoryError("CUDA out of memory")


def nothing(trainer: Trainer) -> None:
    """No fault in the engine: the controller is the fault."""


FAULTS: dict[str, Callable[[Trainer], None]] = {
    "NaN batch": nan_batch,
    "exploding branch": exploding_branch,
    "poisoned gradient": poisoned_gradient,
    "bit flips in weights": bit_flips,
    "learning rate × 1000": learning_rate,
    "strategy returns NaN": strategy_nan,
    "NaN as alpha": poisoned_alpha,
    "full GPU": full_gpu,
    "controller approves everything": nothing,
}


def train(fault: str, seed: int, device: torch.device) -> dict[str, Any]:
    """One run with a fault ('' for none)."""
    config = compose([*WORDS, f"seed={seed}"])
    port = Growing(approving=fault == "controller approves everything")
    trainer = build_trainer(config, config.task.build(), device, port)
    outcome, accuracy = "recovered", float("nan")
    try:
        trainer.model.train()
        while trainer.outcome.steps < 72:
            trainer.advance()
        if fault:
            FAULTS[fault](trainer)
        final = trainer.fit().final
        accuracy = (final["validation/accuracy"] + final["test/accuracy"]) / 2
    except UserError as error:
        outcome = f"stopped: {error}"
    HOARD.clear()
    torch.cuda.empty_cache()
    assert trainer.governor is not None
    found = any(anomaly.culprits for anomaly in trainer.governor.anomalies)
    return {
        "fault": fault or "none", "seed": seed, "outcome": outcome, "accuracy": accuracy,
        "rollbacks": len(trainer.governor.anomalies), "culprit_found": found, "alerts": " | ".join(port.alerts),
    }  # fmt: skip


def main(arguments: list[str]) -> int:
    """Run, write, report; 1 when a fault was neither recovered nor stopped, or cost more than the spread."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    options = parser.parse_args(arguments)
    device = chosen(options.device)
    torch.set_num_threads(1)
    undisturbed = {seed: train("", seed, device) for seed in range(options.seeds)}
    rows = list(undisturbed.values()) + [train(fault, seed, device) for fault in FAULTS for seed in range(options.seeds)]
    for row in rows:
        row["undisturbed"] = undisturbed[row["seed"]]["accuracy"]
    with (HERE / RESULTS[options.device]).open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return report(rows, options)


def report(rows: list[dict[str, Any]], options: argparse.Namespace) -> int:
    """The table, between the README's marks of its device."""
    base = [row["accuracy"] for row in rows if row["fault"] == "none"]
    mean, spread = statistics.mean(base), statistics.stdev(base)
    lines = [
        f"`{' '.join(WORDS)}`, seeds 0–{options.seeds - 1}; torch {torch.__version__}, "
        f"{torch.cuda.get_device_name() if options.device == 'cuda' else f'{platform.machine()}, {os.cpu_count()} cores'}.",
        "",
        f"Undisturbed: accuracy {mean:.4f} ± {spread:.4f} (standard deviation over seeds), {min(base):.4f} to {max(base):.4f}, "
        f"{sum(row['rollbacks'] for row in rows if row['fault'] == 'none')} rollbacks.",
        "",
        "| fault | recovered | stopped | rollbacks | culprit named | accuracy | against its undisturbed run | within the spread |",
        "|---|---|---|---|---|---|---|---|",
    ]
    bad = 0
    for fault in FAULTS:
        mine = [row for row in rows if row["fault"] == fault]
        through = [row for row in mine if row["outcome"] == "recovered"]
        said = "| – | – | – |"
        if through:
            accuracy = statistics.mean(row["accuracy"] for row in through)
            change = statistics.mean(row["accuracy"] - row["undisturbed"] for row in through)
            within = accuracy >= mean - 2 * spread
            bad += not within
            said = f"| {accuracy:.4f} | {change:+.4f} | {'yes' if within else 'NO'} |"
        lines.append(
            f"| {fault} | {len(through)}/{len(mine)} | {len(mine) - len(through)} | {sum(row['rollbacks'] for row in mine)} "
            f"| {sum(row['culprit_found'] for row in mine)} {said}"
        )
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    mark = f"<!-- results {options.device} -->\n"
    before, _, rest = readme.partition(mark)
    after = rest.partition("<!-- end -->")[2]
    (HERE / "README.md").write_text(before + mark + "\n".join(lines) + "\n<!-- end -->" + after, encoding="utf-8")
    print("\n".join(lines))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
