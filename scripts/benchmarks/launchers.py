"""`scripts/bench launchers`: 64 short jobs of a sweep with hydra/launcher=local, and on a Ray cluster of four nodes of this machine.

Both have four workers, and take turns. Overhead is the sweep's time without its jobs' step loops, which are shared out among the workers.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from scripts.benchmarks._machine import machine

LIMIT = 1.10
ROOT = Path(__file__).resolve().parents[2]
WORDS = ("debug=tiny", "trainer.control=false", "tracking=csv", "compare.figures=false")


def once(words: list[str], jobs: int, workers: int, environment: dict[str, str]) -> tuple[float, float]:
    """(seconds of the sweep, seconds of it beside the step loops)."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "esper", "-m", f"seed=range(0,{jobs})", *WORDS, f"output={folder}", *words]
        began = time.monotonic()
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        seconds = time.monotonic() - began
        found = [json.loads(path.read_text(encoding="utf-8")) for path in Path(folder).glob("sweeps/*/*/*/summary.json")]
    if done.returncode or len(found) != jobs:
        raise SystemExit(f"{len(found)} of {jobs} jobs ended:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return seconds, seconds - sum(one["seconds"]["total"] for one in found) / workers


def main(arguments: list[str]) -> int:
    """Print both; 1 when Ray's sweep took more than a tenth longer than the local one."""
    parser = argparse.ArgumentParser(prog="scripts/bench launchers", description=__doc__)
    parser.add_argument("--jobs", type=int, default=64)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    options = parser.parse_args(arguments)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))}
    with tempfile.TemporaryDirectory() as folder:
        script = [sys.executable, str(ROOT / "scripts" / "cluster_servers.py")]
        subprocess.run([*script, "up", "--folder", folder, "--nodes", str(options.workers)], env=environment, check=True)
        try:
            host, number = json.loads((Path(folder) / "cluster.json").read_text(encoding="utf-8"))["servers"]["ray"]
            environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(Path(folder) / "ray-token")}
            ways = {
                "local": [f"hydra.launcher.workers={options.workers}"],
                "ray": ["hydra/launcher=ray", f"hydra.launcher.address={host}:{number}"],
            }
            found: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
            for _ in range(options.repeats):
                for name, words in ways.items():
                    found[name].append(once(words, options.jobs, options.workers, environment))
                    print(name, *(round(value, 1) for value in found[name][-1]), flush=True)
        finally:
            subprocess.run([*script, "down", "--folder", folder], env=environment, check=True)
    rows: dict[str, Any] = {
        name: {"seconds": [round(all_, 1) for all_, _ in some], "overhead": [round(rest, 1) for _, rest in some]}
        for name, some in found.items()
    }
    medians = {name: statistics.median(all_ for all_, _ in some) for name, some in found.items()}
    report = {
        "machine": machine("ray"),
        "jobs": options.jobs,
        "workers": options.workers,
        **rows,
        "ratio": medians["ray"] / medians["local"],
    }
    options.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=2))
    return int(report["ratio"] > LIMIT)
