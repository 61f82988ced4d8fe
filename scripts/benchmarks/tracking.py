"""`scripts/bench tracking`: what tracking costs. The same run with tracking=none and tracking=mlflow, in turns.

The issue's limits: at most 2 % of the step loop's time, and at most 8 s fixed (everything outside the step loop).
The verdict is on the median of paired differences in wall time, which a machine busy with other things spoils: look at
the load that is printed. Beside it stands the processor time of the tracker's threads in the training process: the
trainer cannot have waited longer for the interpreter than they held it, whatever else ran.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

THREADS = re.compile(r"tracking took ([\d.]+) s")
LOOP_LIMIT, FIXED_LIMIT_S = 0.02, 8.0
ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Timing:
    """One run, seconds: the step loop, the process outside it, and the tracker's threads on the processor meanwhile."""

    loop: float
    fixed: float
    threads: float


def timed(tracking: str, overrides: list[str]) -> Timing:
    """Run the main job once in a fresh process and a fresh outputs folder."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "esper",
            f"tracking={tracking}",
            f"output={folder}",
            "trainer.control=false",
            *overrides,
        ]
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
        began = time.perf_counter()
        done = subprocess.run(
            command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False
        )
        wall = time.perf_counter() - began
        if done.returncode:
            raise SystemExit(f"the run with tracking={tracking} failed:\n{done.stderr[-4000:]}")
        summary = json.loads(next(Path(folder).rglob("summary.json")).read_text(encoding="utf-8"))
        loop = summary["seconds"]["total"]
        said = next(Path(folder).rglob("esper.log")).read_text(encoding="utf-8")
        return Timing(loop, wall - loop, sum(map(float, THREADS.findall(said))))


def main(arguments: list[str]) -> int:
    """Print the table; 1 when a limit is missed."""
    parser = argparse.ArgumentParser(prog="scripts/bench tracking", description=__doc__)
    parser.add_argument("--pairs", type=int, default=5, help="pairs of runs")
    parser.add_argument("overrides", nargs="*", help="overrides for every run, like trainer.steps=2000")
    options = parser.parse_args(arguments)
    pairs = []
    for number in range(options.pairs):
        order = ("none", "mlflow") if number % 2 == 0 else ("mlflow", "none")  # neither always comes first
        found = {tracking: timed(tracking, options.overrides) for tracking in order}
        pairs.append((found["none"], found["mlflow"]))
        print(*(f"{name}: loop {run.loop:.2f} s, fixed {run.fixed:.2f} s;" for name, run in found.items()), flush=True)
    share = statistics.median(on.loop / off.loop - 1 for off, on in pairs)
    spread = [on.loop / off.loop - 1 for off, on in pairs]
    fixed = statistics.median(on.fixed - off.fixed for off, on in pairs)
    threads = statistics.median(on.threads / on.loop for _, on in pairs)
    load = f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
    print(f"{platform.platform()}, Python {platform.python_version()}, {load}")
    print(f"step loop: {share:+.1%} (of {min(spread):+.1%} to {max(spread):+.1%}; limit {LOOP_LIMIT:+.0%})")
    print(f"tracker's threads: {threads:.1%} of the step loop")
    print(f"fixed: {fixed:+.2f} s (limit {FIXED_LIMIT_S:.0f} s)")
    return int(share > LOOP_LIMIT or fixed > FIXED_LIMIT_S)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
