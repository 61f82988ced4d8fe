"""Checkpoints: what saving, loading and rolling back take against copying, writing, reading and training.

Every row is a ratio of wall times taken in turns in one process, with the ratio of processor times beside it: on a machine that others use,
the wall tells what they did.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from scripts.benchmarks._baseline import Spread, regressions
from scripts.benchmarks._machine import chosen
from scripts.benchmarks.checkpoint_parts import on_disk, running
from scripts.benchmarks.checkpoint_parts.spent import Spent

LIMITS = {**on_disk.LIMITS, **running.LIMITS}
RESULTS = {"cpu": Path(__file__).with_suffix(".json"), "cuda": Path(__file__).with_name("checkpoint_cuda.json")}


def row(name: str, ratios: list[Spent]) -> dict[str, Any]:
    """One measured ratio with all its repetitions."""
    wall = [ratio.wall for ratio in ratios]
    return {
        "median": round(statistics.median(wall), 4),
        "all": [round(ratio, 4) for ratio in wall],
        "processor": round(statistics.median(ratio.cpu for ratio in ratios), 4),
        "limit": None if math.isnan(LIMITS[name]) else LIMITS[name],
    }


def main(arguments: list[str]) -> int:
    """Measure, print, and with ``--check`` fail where a median misses its limit or a ratio is worse than the baseline's."""
    parser = argparse.ArgumentParser(prog="scripts/bench checkpoint", description=__doc__.split("\n")[0])
    parser.add_argument("--parameters", type=int, default=100_000_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--turns", type=int, default=9, help="of 100 steps, with a save and without")
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="on the disk to measure")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="where the model is")
    parser.add_argument("--check", action="store_true", help="exit code 1 where a limit is missed or the baseline was better")
    parser.add_argument("--baseline", type=Path, help="what --check compares with; the committed one of the device")
    parser.add_argument("--write", action="store_true", help="keep the result as the committed one of the device")
    options = parser.parse_args(arguments)
    device, kept = chosen(options.device), RESULTS[options.device]
    baseline = options.baseline or kept
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        ratios = on_disk.measure(options.parameters, options.repeats, Path(folder), device)
        ratios |= running.measure(options.turns, Path(folder), device)
    result = {
        "parameters": options.parameters,
        "bytes": 12 * options.parameters,
        "repeats": options.repeats,
        "turns": options.turns,
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}",
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "ratios": {name: row(name, values) for name, values in ratios.items()},
    }
    print(json.dumps(result, indent=2))
    worse = regressions(spreads(result), spreads(json.loads(baseline.read_text(encoding="utf-8")))) if options.check else []
    for sentence in worse:
        print(f"worse than {baseline}: {sentence}", file=sys.stderr)
    if options.write:
        kept.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    missed = [name for name, found in result["ratios"].items() if found["limit"] and found["median"] > found["limit"]]
    return 1 if options.check and (missed or worse) else 0


def spreads(result: dict[str, Any]) -> dict[str, Spread]:
    """The ratios of wall times by row."""
    return {name: Spread.of(found["all"]) for name, found in result["ratios"].items()}
