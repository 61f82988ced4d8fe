"""`scripts/bench start`: seconds from the start of the process to the end of the first training step, modules warm in the file cache.

Wall time is what the limit is on; the process's own processor time stands beside it, for a machine that others use too.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LIMIT_S = 6.0
ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import os, sys, time
from esper import app
from esper.trainer.trainer import Trainer
step = Trainer._step
def first(self, number):
    step(self, number)
    print("FIRST", time.time(), time.process_time(), flush=True)
    os._exit(0)
Trainer._step = first
sys.exit(app.main(sys.argv[1:]))
"""


def once(overrides: list[str]) -> tuple[float, float]:
    """(wall, processor) seconds of one start."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", PROGRAM, f"output={folder}", "trainer.control=false", *overrides]
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
        began = time.time()
        done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False)
    said = [line.split() for line in done.stdout.splitlines() if line.startswith("FIRST ")]
    if not said:
        raise SystemExit(f"no step was made:\n{done.stderr[-4000:]}")
    return float(said[0][1]) - began, float(said[0][2])


def main(arguments: list[str]) -> int:
    """Print the median; 1 when the limit is missed."""
    parser = argparse.ArgumentParser(prog="scripts/bench start", description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("overrides", nargs="*", help="overrides, like task=mnist1d")
    options = parser.parse_args(arguments)
    once(options.overrides)
    found = [once(options.overrides) for _ in range(options.repeats)]
    wall, busy = (statistics.median(column) for column in zip(*found, strict=True))
    fastest = min(column[0] for column in found)
    print(f"start to first step: {wall:.2f} s (fastest {fastest:.2f}; limit {LIMIT_S:.0f}), {busy:.2f} s of processor time")
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    return int(wall > LIMIT_S)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
