"""What a sweep costs beside its runs: the same jobs one after another and as a sweep on all cores.

    python experiments/sweep_speed/run.py --jobs 24            # the default run; writes README.md beside itself

Best on a machine that does nothing else meanwhile; what else it does is in the load averages.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path

TEXT = """# What does a sweep cost beside its runs?

**Question.** {jobs} jobs of the default run{steps} on {cores} cores: how long do they take as a sweep, and how long
one after another as single runs? How long does a job take from its start to its first step?

**Command.** `{command}` (Python {python}; half of the single runs come before the sweep and half after it, so that
other load of the machine meets both; load average of the last minute {loads} when the single runs, the sweep and
the other single runs began and at the end; a single run alone makes about 1, the sweep about {cores}, what exceeds that were other
programs on the same cores). This file is written by it.

| | seconds | |
|---|---|---|
| one after another | {single:.1f} | |
| as a sweep | {sweep:.1f} | ratio {ratio:.2f}, limit 0.60 |
| start to first step, single run, mean | {start:.2f} | |
| start to first step, job of the sweep, mean | {job:.2f} | {more:+.0f} % of a single run's, limit +10 % |
| the same, without the first job of each worker | {reused:.2f} | |
| before and after the steps, single run, mean | {around_single:.1f} | |
| before and after the steps, job of the sweep, mean | {around_job:.1f} | |

A single run starts Python, Hydra and its own tracker. At its end it logs its model and draws its figures. A sweep starts its workers and
its tracker once, and leaves out models and figures unless you ask for them ([comparing](../../docs/comparing.md)).
`python experiments/sweep_speed/beyond.py --seeds 6` runs 42 jobs and measures the share of the time outside their step loops, by cause.
"""


def esper(*words: str) -> float:
    """Wall time of one command."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "esper", *words], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - started


def loops(folder: Path, pattern: str) -> list[float]:
    """Seconds in the step loop of all runs below ``folder``."""
    return [json.loads(path.read_text())["seconds"]["total"] for path in folder.glob(pattern)]


def first_step(log: Path) -> float:
    """When the run in this log began its first step, in seconds since 1970."""
    for line in log.read_text().splitlines():
        if " INFO esper.running.run: step 1 of " in line:
            return datetime.strptime(line[:23], "%Y-%m-%d %H:%M:%S,%f").timestamp()
    raise ValueError(f"{log} does not say when the first step began")


def single(folder: Path, seed: int, extra: list[str]) -> tuple[float, float]:
    """Wall seconds of a run by itself, and those before its first step."""
    began = time.time()
    wall = esper(f"seed={seed}", f"output={folder}", *extra)
    return wall, max(first_step(log) for log in folder.glob("*/*/esper.log")) - began


def starts(folder: Path) -> list[float]:
    """Seconds from the start of every job of a sweep to its first step, in the order in which the jobs began."""
    began = {path.parent: path.stat().st_mtime - json.loads(path.read_text())["seconds"] for path in folder.glob("*/job.json")}
    return [first_step(job / "job.log") - began[job] for job in sorted(began, key=lambda job: began[job])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=24)
    parser.add_argument("--steps", type=int, default=0, help="shorter runs, for a try")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder of README.md")
    given = parser.parse_args()
    extra = [f"trainer.steps={given.steps}"] if given.steps else []
    cores, loads = len(os.sched_getaffinity(0)), [os.getloadavg()[0]]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        half = given.jobs // 2
        singles = [single(folder / "a", seed, extra) for seed in range(half)]
        loads.append(os.getloadavg()[0])
        words = ["-m", f"seed=range(0,{given.jobs})", f"output={folder}/b", f"hydra.sweep.dir={folder}/b/s", *extra]
        sweep = esper(*words)
        loads.append(os.getloadavg()[0])
        singles += [single(folder / "a", seed, extra) for seed in range(half, given.jobs)]
        loads.append(os.getloadavg()[0])
        inside_single, inside_job = loops(folder, "a/*/*/summary.json"), loops(folder, "b/s/*/summary.json")
        jobs = [json.loads(path.read_text())["seconds"] for path in folder.glob("b/s/*/job.json")]
        started = starts(folder / "b" / "s")
    alone = sum(wall for wall, _ in singles)
    start, job = (sum(found) / given.jobs for found in ([first for _, first in singles], started))
    reused = started[cores:] or [float("nan")]
    text = TEXT.format(
        jobs=given.jobs,
        steps=f" cut to {given.steps} steps" if given.steps else "",
        cores=cores,
        command=" ".join(["python experiments/sweep_speed/run.py", *sys.argv[1:]]),
        python=platform.python_version(),
        loads=", ".join(f"{load:.1f}" for load in loads),
        single=alone,
        sweep=sweep,
        ratio=sweep / alone,
        start=start,
        job=job,
        more=100 * (job / start - 1),
        reused=sum(reused) / len(reused),
        around_single=(alone - sum(inside_single)) / given.jobs,
        around_job=(sum(jobs) - sum(inside_job)) / given.jobs,
    )
    print(text)
    (given.out / "README.md").write_text(text)


if __name__ == "__main__":
    main()
