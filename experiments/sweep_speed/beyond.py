"""What a sweep's jobs cost beyond their step loops, and where it goes: the grown net beside its six controls.

    python experiments/sweep_speed/beyond.py --seeds 6         # 42 jobs; writes beyond.md beside itself

Shares are of the seconds in the step loops, so a machine that does other things slows both sides alike; it is best quiet all the same.
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
from dataclasses import dataclass
from pathlib import Path

from run import first_step

LIMIT = 0.15
TEXT = """# What do a sweep's jobs cost beyond their step loops?

**Question.** The {jobs} jobs of `{sweep}` on {workers} workers: what share of the time is not spent in step loops, and where does it go?

**Command.** `{command}` (Python {python}; load average of the last minute {loads} when it began and ended, of which the sweep
itself makes about {workers}). This file is written by it.

| seconds of all workers | | of the step loops |
|---|---|---|
{rows}

A job takes {before:.2f} s from its start to its first step, {loop:.1f} s in its step loop, and {after:.2f} s from its last step to its end.
Jobs wait if an arm depends on another one (`scratch` on `grown`, `scratch_macs` on both), and at the end, when fewer jobs than workers
are left.
"""


@dataclass(frozen=True)
class Timed:
    """One job: seconds since 1970 at its start, its first step and its end, and seconds in its step loop."""

    start: float
    first: float
    end: float
    loop: float


def timed(folder: Path) -> Timed:
    """The job in this folder, from what it left."""
    note = folder / "job.json"
    end, told = note.stat().st_mtime, json.loads(note.read_text())
    if told["status"] != "FINISHED":
        raise SystemExit(f"{folder} failed: {told['error']}")
    loop = json.loads((folder / "summary.json").read_text())["seconds"]["total"]
    return Timed(end - told["seconds"], first_step(folder / "job.log"), end, loop)


def parts(jobs: list[Timed], began: float, ended: float, workers: int) -> dict[str, float]:
    """Seconds of all workers by what they went to; they add up to ``workers`` times the wall time."""
    first, last = min(job.start for job in jobs), max(job.end for job in jobs)
    return {
        "step loops": sum(job.loop for job in jobs),
        "start of the sweep: composing, planning, the workers' imports": workers * (first - began),
        "jobs, before the first step": sum(job.first - job.start for job in jobs),
        "jobs, after the last step": sum(job.end - job.first - job.loop for job in jobs),
        "workers that wait": workers * (last - first) - sum(job.end - job.start for job in jobs),
        "end of the sweep: verdict, figures, tracker": workers * (ended - last),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder of beyond.md")
    parser.add_argument("words", nargs="*", help="more words of the sweep's command, for a try: trainer.steps=300 tracking=none")
    given = parser.parse_args()
    sweep = ["experiment=controls", f"seed=range(0,{given.seeds})", *given.words]
    loads = [os.getloadavg()[0]]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "sweep"
        places = [f"output={name}", f"hydra.sweep.dir={folder}", f"hydra.launcher.workers={given.workers}"]
        began = time.time()
        subprocess.run([sys.executable, "-m", "esper", *sweep, *places], check=True, stdout=subprocess.DEVNULL)
        ended = time.time()
        jobs = [timed(path.parent) for path in folder.glob("*/job.json")]
    loads.append(os.getloadavg()[0])
    found = parts(jobs, began, ended, given.workers)
    loops = found["step loops"]
    beyond = sum(found.values()) - loops
    rows = [f"| {name} | {seconds:.1f} | {seconds / loops:.1%} |" for name, seconds in found.items()]
    rows.append(f"| **all but the step loops** | {beyond:.1f} | **{beyond / loops:.1%}**, limit {LIMIT:.0%} |")
    text = TEXT.format(
        jobs=len(jobs),
        sweep=" ".join(["esper", *sweep]),
        workers=given.workers,
        command=" ".join(["python experiments/sweep_speed/beyond.py", *sys.argv[1:]]),
        python=platform.python_version(),
        loads=" and ".join(f"{load:.1f}" for load in loads),
        rows="\n".join(rows),
        before=found["jobs, before the first step"] / len(jobs),
        after=found["jobs, after the last step"] / len(jobs),
        loop=loops / len(jobs),
    )
    print(text)
    (given.out / "beyond.md").write_text(text)


if __name__ == "__main__":
    main()
