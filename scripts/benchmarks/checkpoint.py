"""Checkpoints of a large model against copying, writing and reading the same bytes.

Saves a state of the size of a model with AdamW, in three ratios: the training thread's stall to a copy of those bytes in memory,
the whole save to writing those bytes to the same disk (both wait for it), and loading with all its checks to reading the
file. Repetitions alternate, so that both sides of a ratio see the same machine. Limits: 1.2, 1.3, 1.3.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from esper.training.checkpoint import store
from esper.training.checkpoint.tree import split

LIMITS = {"stall / copy": 1.2, "save / write": 1.3, "load / read": 1.3}
RESULT = Path(__file__).with_suffix(".json")


def state(parameters: int) -> dict[str, object]:
    """A host of ``parameters`` numbers with AdamW's two moments, in tensors as a transformer has them."""
    width = 1024
    count = max(1, parameters // (width * width))
    return {
        "host": {f"layer{n}.weight": torch.randn(width, width) for n in range(count)},
        "optimizer": [
            {"step": torch.tensor(1.0), "exp_avg": torch.randn(width, width), "exp_avg_sq": torch.rand(width, width)}
            for _ in range(count)
        ],
    }


def timed(work: Callable[[], object]) -> float:
    """Seconds of one call."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def write_raw(path: Path, pieces: list[memoryview]) -> None:
    """The same bytes, as plainly as can be, and wait for the disk."""
    with path.open("wb", buffering=0) as file:
        for piece in pieces:
            left = piece
            while left:
                left = left[file.write(left) :]
        os.fsync(file.fileno())


def read_raw(path: Path) -> None:
    """The same bytes into memory."""
    content = bytearray(path.stat().st_size)
    with path.open("rb", buffering=0) as file:
        view, position = memoryview(content), 0
        while position < len(content):
            position += file.readinto(view[position : position + (16 << 20)]) or len(content)


def measure(parameters: int, repeats: int, folder: Path) -> dict[str, list[float]]:
    """The three ratios, one a repetition."""
    tree = state(parameters)
    _, tensors = split(tree)
    pieces = [memoryview(tensor.reshape(-1).view(torch.uint8).numpy()) for tensor in tensors.values()]
    ratios: dict[str, list[float]] = {name: [] for name in LIMITS}
    for repeat in range(repeats + 1):  # the first touches memory and disk for the first time
        copy = timed(lambda: [tensor.clone() for tensor in tensors.values()])
        began = time.perf_counter()
        taken = store.copy(tree, 1, 1, {}, None)
        stall = time.perf_counter() - began
        write = timed(lambda: write_raw(folder / "raw", pieces))
        began = time.perf_counter()
        store.write(taken, folder / "checkpoints")
        save = time.perf_counter() - began
        del taken
        read = timed(lambda: read_raw(folder / "raw"))
        load = timed(lambda: store.read(folder / "checkpoints" / f"{1:09d}"))
        shutil.rmtree(folder / "checkpoints")
        (folder / "raw").unlink()
        if repeat:
            for name, ratio in zip(LIMITS, (stall / copy, save / write, load / read), strict=True):
                ratios[name].append(ratio)
    return ratios


def main(arguments: list[str]) -> int:
    """Measure, print, and with ``--check`` fail where a median misses its limit."""
    parser = argparse.ArgumentParser(prog="scripts/bench checkpoint", description=__doc__.split("\n")[0])
    parser.add_argument("--parameters", type=int, default=100_000_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="on the disk to measure")
    parser.add_argument("--check", action="store_true", help="exit code 1 where a median misses its limit")
    parser.add_argument("--write", action="store_true", help=f"keep the result in {RESULT.name}")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        ratios = measure(options.parameters, options.repeats, Path(folder))
    result = {
        "parameters": options.parameters,
        "bytes": 12 * options.parameters,
        "repeats": options.repeats,
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.0f}",
        "torch": torch.__version__,
        "ratios": {
            name: {"median": round(statistics.median(values), 3), "all": [round(value, 3) for value in values], "limit": LIMITS[name]}
            for name, values in ratios.items()
        },
    }
    print(json.dumps(result, indent=2))
    if options.write:
        RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    missed = [name for name, values in ratios.items() if statistics.median(values) > LIMITS[name]]
    return 1 if options.check and missed else 0
