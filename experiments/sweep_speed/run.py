"""What a sweep costs beside its runs: the same jobs one after another and as a sweep on all cores.

    python experiments/sweep_speed/run.py --jobs 24            # the default run; writes README.md beside itself

Needs a machine that does nothing else meanwhile.
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
from pathlib import Path

TEXT = """# What does a sweep cost beside its runs?

**Question.** {jobs} jobs of the default run{steps} on {cores} cores: how long as a sweep, against one after another, and
how much is added to a job before its first step and after its last?

**Command.** `{command}` (Python {python}; load average {load:.1f} when it ended). This file is written by it.

| | seconds | |
|---|---|---|
| one after another | {single:.1f} | |
| as a sweep | {sweep:.1f} | ratio {ratio:.2f}, limit 0.60 |
| beside the step loop, single run, mean | {around_single:.1f} | |
| beside the step loop, job of the sweep, mean | {around_job:.1f} | {added:+.1f} % of a run, limit +10 % |
"""


def esper(*words: str) -> float:
    """Wall time of one command."""
    started = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "esper", *words], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    return time.perf_counter() - started


def loops(folder: Path, pattern: str) -> list[float]:
    """Seconds in the step loop of all runs below ``folder``."""
    return [json.loads(path.read_text())["seconds"]["total"] for path in folder.glob(pattern)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=24)
    parser.add_argument("--steps", type=int, default=0, help="shorter runs, for a try")
    given = parser.parse_args()
    extra = [f"trainer.steps={given.steps}"] if given.steps else []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        walls = [esper(f"seed={seed}", f"output={folder}/a", *extra) for seed in range(given.jobs)]
        words = ["-m", f"seed=range(0,{given.jobs})", f"output={folder}/b", f"hydra.sweep.dir={folder}/b/s", *extra]
        sweep = esper(*words)
        inside_single, inside_job = loops(folder, "a/*/*/summary.json"), loops(folder, "b/s/*/summary.json")
        jobs = [json.loads(path.read_text())["seconds"] for path in folder.glob("b/s/*/job.json")]
    around_single = (sum(walls) - sum(inside_single)) / given.jobs
    around_job = (sum(jobs) - sum(inside_job)) / given.jobs
    text = TEXT.format(
        jobs=given.jobs,
        steps=f" cut to {given.steps} steps" if given.steps else "",
        cores=len(os.sched_getaffinity(0)),
        command=" ".join(["python experiments/sweep_speed/run.py", *sys.argv[1:]]),
        python=platform.python_version(),
        load=os.getloadavg()[0],
        single=sum(walls),
        sweep=sweep,
        ratio=sweep / sum(walls),
        around_single=around_single,
        around_job=around_job,
        added=100 * (around_job - around_single) / (sum(walls) / given.jobs),
    )
    print(text)
    (Path(__file__).parent / "README.md").write_text(text)


if __name__ == "__main__":
    main()
