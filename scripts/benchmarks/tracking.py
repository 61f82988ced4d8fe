"""`scripts/bench tracking`: what tracking costs. The same run with tracking=none and tracking=mlflow, short and long, in turns.

The limits: at most 2 % of the step loop's time, and at most 8 s fixed. The share is read off the step loop of the long run. The
fixed part is everything that tracking adds to the whole process of the short one: MLflow's import of seconds lies beside its
steps and slows them where two logical processors share a core, and so do the figures and the model at its end. The verdict is on
medians of paired differences in wall time, which a machine busy with other things spoils: look at the load that is printed.
Beside it stands the processor time of the tracker's threads in the training process: the trainer cannot have waited longer for
the interpreter than they held it, whatever else ran.
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
    """One run, seconds: the step loop, the whole process, and the tracker's threads on the processor during the loop."""

    loop: float
    wall: float
    threads: float


@dataclass
class Pair:
    """The same run without and with tracking."""

    off: Timing
    on: Timing

    @property
    def added(self) -> float:
        """Seconds that tracking adds to the whole process."""
        return self.on.wall - self.off.wall


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
        done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False)
        wall = time.perf_counter() - began
        if done.returncode:
            raise SystemExit(f"the run with tracking={tracking} failed:\n{done.stderr[-4000:]}")
        summary = json.loads(next(Path(folder).rglob("summary.json")).read_text(encoding="utf-8"))
        loop = summary["seconds"]["total"]
        said = next(Path(folder).rglob("esper.log")).read_text(encoding="utf-8")
        return Timing(loop, wall, sum(map(float, THREADS.findall(said))))


def pair(number: int, overrides: list[str]) -> Pair:
    """Two runs; neither kind always comes first."""
    order = ("none", "mlflow") if number % 2 == 0 else ("mlflow", "none")
    found = {tracking: timed(tracking, overrides) for tracking in order}
    both = Pair(found["none"], found["mlflow"])
    print(
        f"{' '.join(overrides)}: loop {both.off.loop:.2f} s without, {both.on.loop:.2f} s with tracking; "
        f"whole process {both.off.wall:.2f} s and {both.on.wall:.2f} s",
        flush=True,
    )
    return both


def main(arguments: list[str]) -> int:
    """Print the table; 1 when a limit is missed."""
    parser = argparse.ArgumentParser(prog="scripts/bench tracking", description=__doc__)
    parser.add_argument("--pairs", type=int, default=3, help="pairs of runs of each length")
    parser.add_argument("--steps", type=int, nargs=2, default=(2000, 20_000), help="the two lengths")
    parser.add_argument("overrides", nargs="*", help="overrides for every run, like model=cnn")
    options = parser.parse_args(arguments)
    short, long = (
        [pair(number, [f"trainer.steps={steps}", *options.overrides]) for number in range(options.pairs)] for steps in options.steps
    )
    shares = [one.on.loop / one.off.loop - 1.0 for one in long]
    share, fixed = statistics.median(shares), statistics.median(one.added for one in short)
    threads = statistics.median(one.on.threads / one.on.loop for one in long)
    print(f"{platform.platform()}, Python {platform.python_version()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    print(f"step loop: {share:+.1%} (of {min(shares):+.1%} to {max(shares):+.1%}; limit {LOOP_LIMIT:+.0%})")
    print(f"tracker's threads: {threads:.1%} of the longer step loop")
    print(f"fixed: {fixed:+.2f} s (limit {FIXED_LIMIT_S:.0f} s)")
    return int(share > LOOP_LIMIT or fixed > FIXED_LIMIT_S)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
