"""How long ``esper list`` takes over many runs; makes up an outputs folder and a store, and times the command.

python experiments/list_speed/run.py --runs 1000 10000
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import platform
import resource
import sqlite3
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).resolve().parent
JOBS = 100  # of a sweep
FILES = ("config.yaml", "weights.csv", "metrics.parquet", "seeds.parquet", "gates.parquet", "transitions.parquet", "environments.json")
SUMMARY = {  # of a default run of 300 steps: 15 kB, most of it curves of the controls
    "run": "made-up",
    "name": "mlp-digits",
    "status": "FINISHED",
    "primary": "validation/accuracy",
    "direction": "max",
    "seed": 0,
    "macs": 127_822_752,
    "seconds": {"total": 3.69},
    "metrics": {"final": {"test/accuracy": 0.8316, "test/loss": 0.5717}, "best": {}},
    "control_curves": {"same_macs": {f"validation/{n}": [[i, i * 67_584.0, 0.5] for i in range(200)] for n in ("accuracy", "loss")}},
}

TEXT = """# How long does `esper list` take over many runs?

**Question.** An outputs folder has sweeps of {jobs} jobs each, every job's folder the files of a real run and a summary of
{kilobytes:.0f} kB. A sqlite store has as many runs, each with 55 metrics, 6 parameters and 17 tags. How long does
`esper list kind=run,job,sweep` take, from the command to its last line, over the folder alone, over the store alone, and over both,
where every run is found in both?

**Command.** `python experiments/list_speed/run.py --runs {counts}` (Python {python}, {cores} cores; load average of the
last minute {before:.1f} when it began and {after:.1f} when it ended: the cores were shared with other programs as far as this exceeds 1).
Best of three. This file is written by it.

| runs | of | seconds, whole command | processor time of it | limit |
|---|---|---|---|---|
{rows}
"""


def compare_speed() -> ModuleType:
    """The study that fills a store."""
    spec = importlib.util.spec_from_file_location("compare_speed", HERE.parent / "compare_speed" / "run.py")
    assert spec is not None and spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def fill(output: Path, runs: int) -> None:
    """Folders of ``runs`` jobs, and a store that knows them."""
    output.mkdir()
    compare_speed().fill(output, runs)
    with contextlib.closing(sqlite3.connect(output / "mlflow.db")) as store, store:
        ids = [row[0] for row in store.execute("SELECT run_uuid FROM params WHERE key = 'arm' ORDER BY run_uuid")]
        for number, run in enumerate(ids):
            job = output / "sweeps" / "day" / f"{number // JOBS}" / f"{number % JOBS}"
            (job / "checkpoints").mkdir(parents=True)
            for name in FILES:
                (job / name).touch()
            (job / "summary.json").write_text(json.dumps(SUMMARY))
            (job / "job.json").write_text(json.dumps({"status": "FINISHED", "error": "", "arm": "arm0", "block": ""}))
            (job / "mlflow.json").write_text(json.dumps({"run": run}))
            if number % JOBS == 0:
                note = {"id": f"made-up-{number // JOBS}", "name": "made up", "parent": "", "command": [], "ended": True}
                (job.parent / "sweep.json").write_text(json.dumps(note))
            tags = (("esper.run", job.name), ("esper.folder", str(job.resolve())))
            store.executemany("INSERT INTO tags (key, value, run_uuid) VALUES (?, ?, ?)", [(*tag, run) for tag in tags])


def timed(words: list[str]) -> tuple[float, float, int]:
    """Seconds and processor seconds of ``esper list``, best of three, and the number of lines that it printed."""
    tries = []
    for _ in range(3):
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        started = time.perf_counter()
        done = subprocess.run([sys.executable, "-m", "esper", "list", *words], check=True, capture_output=True, text=True)
        wall, now = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
        tries.append((wall, now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime, len(done.stdout.splitlines())))
    return min(tries)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, nargs="+", default=[1_000, 10_000])
    given = parser.parse_args()
    rows, before = [], os.getloadavg()[0]
    for runs in given.runs:
        with tempfile.TemporaryDirectory() as place:
            output = Path(place) / "outputs"
            fill(output, runs)
            kinds = "kind=run,job,sweep"
            ways = {
                "folder": [f"output={output}", "uri=none", kinds],
                "store": [f"output={place}/none", f"uri=sqlite:///{output}/mlflow.db", kinds],
                "both": [f"output={output}", kinds],
            }
            for name, words in ways.items():
                wall, used, lines = timed(words)
                assert lines >= runs, f"{lines} lines of {runs} runs"
                rows.append(f"| {runs:,} | {name} | {wall:.2f} | {used:.2f} | 2 |")
                print(rows[-1], flush=True)
    text = TEXT.format(
        jobs=JOBS,
        kilobytes=len(json.dumps(SUMMARY)) / 1000,
        counts=" ".join(map(str, given.runs)),
        python=platform.python_version(),
        cores=os.cpu_count(),
        before=before,
        after=os.getloadavg()[0],
        rows="\n".join(rows),
    )
    (HERE / "README.md").write_text(text)


if __name__ == "__main__":
    main()
