"""`scripts/bench deterministic`: what `trainer.deterministic=true` costs a training step, host by host.

Two processes, one deterministic and one not (a process decides once how cuBLAS works), take turns of the same run on the same
device, so that both see the same machine; a ratio is of a pair of turns. Half of the seeds' branches are being blended in.
"""

from __future__ import annotations

import argparse
import multiprocessing
import platform
import random
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from esper.cli.compose import compose
from esper.running.builders import build_trainer
from esper.trainer.device import keep_freed_memory, numerics
from scripts.benchmarks._machine import chosen
from scripts.benchmarks.checkpoint_parts.running import COMMON, Gardener
from scripts.benchmarks.step import write

LIMIT = 1.15  # on a GPU
GROWN = 20
"""Steps after which the branches are being blended in."""
TEXT = ("task=text", "task.path={text}", "model=transformer", "blueprint=low_rank")
HOSTS = {
    "mlp": (),
    "mlp, 2048 wide": ("model.width=2048", "trainer.batch_size=512"),
    "cnn": ("model=cnn", "blueprint=conv"),
    "cnn, 256 channels": ("model=cnn", "blueprint=conv", "model.channels=[128,256]", "trainer.batch_size=512"),
    "transformer": (*TEXT, "trainer.batch_size=8"),
    "transformer, 512 wide": (*TEXT, "model.width=512", "model.depth=6", "task.context=256", "trainer.batch_size=32"),
}


@dataclass
class Row:
    """One line: ms a step in either mode, and their ratio."""

    host: str
    deterministic_ms: float
    other_ms: float
    ratio_p20: float
    ratio: float
    ratio_p80: float
    limit: float
    pairs: int
    steps: int
    device: str
    torch: str
    python: str


def serve(pipe: Connection, deterministic: bool, device: str, text: str) -> None:
    """A process of one mode: builds the host it is told, then answers seconds for every turn of so many steps; '' ends it."""
    keep_freed_memory()
    torch.set_num_threads(1)
    while name := pipe.recv():
        words = [word.format(text=text) for word in (*COMMON, *HOSTS[name], f"trainer.deterministic={str(deterministic).lower()}")]
        config = compose(words)
        with numerics(config.trainer):
            trainer = build_trainer(config, config.task.build(), chosen(device), Gardener())
            trainer.model.train()
            turn(trainer, GROWN)
            pipe.send(0.0)
            while steps := pipe.recv():
                pipe.send(turn(trainer, steps))
        del trainer


def turn(trainer: Any, steps: int) -> float:
    """Seconds of ``steps`` steps, to the end of the GPU's work."""
    began = time.perf_counter()
    for _ in range(steps):
        trainer.advance()
    if trainer.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def measure(name: str, workers: dict[bool, Connection], pairs: int, steps: int, device: torch.device) -> Row:
    """One host: ``pairs`` of turns of ``steps`` steps, which mode comes first in turns; the first pair is for warmth."""
    for pipe in workers.values():
        pipe.send(name)
    for pipe in workers.values():
        pipe.recv()
    found: dict[bool, list[float]] = {True: [], False: []}
    for number in range(pairs + 1):
        for mode in (True, False) if number % 2 else (False, True):
            workers[mode].send(steps)
            found[mode].append(1e3 * workers[mode].recv() / steps)
    for pipe in workers.values():
        pipe.send(0)
    mine, other = found[True][1:], found[False][1:]
    ratios = torch.tensor([a / b for a, b in zip(mine, other, strict=True)], dtype=torch.float64)
    low, middle, high = ratios.quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist()
    cuda = device.type == "cuda"
    return Row(
        name, *(round(value, 4) for value in (statistics.median(mine), statistics.median(other), low, middle, high)),
        LIMIT if cuda else float("nan"), pairs, steps, torch.cuda.get_device_name(device) if cuda else platform.machine(),
        torch.__version__, platform.python_version(),
    )  # fmt: skip


def main(argv: list[str]) -> int:
    """Print the table and write the CSV; 1 when a host misses the limit."""
    parser = argparse.ArgumentParser(prog="scripts/bench deterministic", description=__doc__)
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--hosts", nargs="+", default=list(HOSTS), choices=list(HOSTS), metavar="HOST", help="; ".join(HOSTS))
    parser.add_argument("--pairs", type=int, default=11, help="of turns, a host")
    parser.add_argument("--steps", type=int, default=50, help="of a turn")
    parser.add_argument("--out", type=Path, default=Path("outputs/bench/deterministic.csv"), help="where the CSV goes")
    options = parser.parse_args(argv)
    device = chosen(options.device)
    context, rows = multiprocessing.get_context("spawn"), []
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder, "words.txt")
        draws = random.Random(0)
        text.write_text(" ".join("".join(draws.choices("abcdefgh", k=draws.randrange(2, 6))) for _ in range(60_000)), encoding="utf-8")
        workers = {}
        for mode in (True, False):
            workers[mode], far = context.Pipe()
            context.Process(target=serve, args=(far, mode, options.device, str(text)), daemon=True).start()
            far.close()
        for name in options.hosts:
            rows.append(measure(name, workers, options.pairs, options.steps, device))
            print(line(rows[-1]), flush=True)
            write(rows, options.out)
        for pipe in workers.values():
            pipe.send("")
    print(f"{rows[-1].device}, torch {rows[-1].torch}; written to {options.out}")
    return int(any(row.ratio > row.limit for row in rows))


def line(row: Row) -> str:
    """One printed line."""
    met = "" if row.limit != row.limit else f"limit {row.limit} {'met' if row.ratio <= row.limit else 'MISSED'}"
    return (
        f"{row.host:24}{row.deterministic_ms:9.3f} ms against {row.other_ms:9.3f} ms  × {row.ratio:.3f} "
        f"({row.ratio_p20:.3f} to {row.ratio_p80:.3f})  {met}"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
