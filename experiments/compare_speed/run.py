"""How long ``esper compare`` takes on a store with many runs; fills a store with made-up runs and times the command.

python experiments/compare_speed/run.py --runs 1000 10000
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import re
import resource
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd

from esper.compare import judge
from esper.compare.results.mlflow_sweep import ARM, BLOCK, KIND, SEED, SWEEP, plan_tags
from esper.compare.results.plan import Plan
from esper.compare.statistics.random_draws import generator
from esper.tracking.mlflow_store import experiment_id, quiet_client

ARMS = 4
METRICS, PARAMS, TAGS = 55, 6, 15  # of a child of `esper -m seed=0,1 grafting=linear,drift` in its store

TEXT = """# How long does `esper compare` take on a large store?

**Question.** A sweep of {arms} arms in a sqlite store of its own, every run with {metrics} metrics, {params} parameters and {tags} tags:
how long does it take from the command to the written page and figures, when the sweep is judged again (`esper compare sweep=`) and when
its runs are judged as those of any program (`esper compare runs`)? How large is the page of a sweep of 200 runs, and when is it drawn?

**Command.** `python experiments/compare_speed/run.py --runs {counts}` (Python {python}, MLflow {mlflow}, {cores} cores;
load average of the last minute {before:.1f} when it began and {after:.1f} when it ended: the cores were shared with other
programs as far as this exceeds 1). This file is written by it.

| runs in the store | command | seconds, whole command | processor time of it | limit |
|---|---|---|---|---|
{rows}

The page of 200 runs with 200 steps each has {size:.2f} MB (limit 3 MB). {drawn}
"""
PROBE = """<script>(function wait() {
  const drawn = window.Bokeh && Bokeh.documents.length && Bokeh.documents.every(one => one.is_idle);
  if (drawn) document.title = "drawn after " + performance.now().toFixed(0); else setTimeout(wait, 5);
})();</script></body>"""


def fill(folder: Path, runs: int) -> None:
    """A parent and ``runs`` children with the tags and metrics that a sweep writes.

    One run of each kind is written by MLflow, and copied in its tables: MLflow itself would take minutes.
    """
    from mlflow.entities import Metric, Param

    uri = f"sqlite:///{folder}/mlflow.db"
    client, rng = quiet_client(uri), generator("speed", runs)
    experiment = experiment_id(client, uri, "esper")
    seeds = tuple(range(runs // ARMS))
    arms = {f"arm{i}": {"x": i} for i in range(ARMS)}
    plan = Plan("accuracy", "max", 0.01, 0.05, 0.8, 0.0, "arm0", arms, seeds)
    parent = client.create_run(experiment, tags={KIND: "sweep", SWEEP: "speed", **plan_tags(plan.text())}, run_name="speed")
    first = client.create_run(experiment, tags={"mlflow.parentRunId": parent.info.run_id}, run_name="arm0 seed=0").info.run_id
    client.log_batch(first, metrics=[Metric("final/test/accuracy", 0.9, 0, 0)], params=[Param("arm", "arm0")])
    client.set_terminated(first)
    with contextlib.closing(sqlite3.connect(folder / "mlflow.db")) as store, store:
        model = dict(zip(*_row(store, "SELECT * FROM runs WHERE run_uuid = ?", first), strict=True))
        store.execute("DELETE FROM runs WHERE run_uuid = ?", (first,))
        names, rows, values = ["final/test/accuracy", "final/cost/macs", "final/cost/seconds"], [], []
        names += [f"curve/{i}" for i in range(METRICS - len(names))]
        for number, (arm, seed) in enumerate((arm, seed) for arm in arms for seed in seeds):
            run = uuid.UUID(int=number + 1).hex
            begun = {"start_time": int(str(model["start_time"])) + number}
            rows.append(tuple({**model, **begun, "run_uuid": run, "name": f"{arm} seed={seed}"}.values()))
            tags = {SWEEP: "speed", ARM: arm, BLOCK: "", SEED: str(seed), "mlflow.parentRunId": parent.info.run_id}
            tags |= {f"note.{i}": "made up" for i in range(TAGS - len(tags))}
            params = {"arm": arm, "seed": str(seed)} | {f"made.up.{i}": "1" for i in range(PARAMS - 2)}
            metrics = [float(rng.normal(0.9, 0.01)), 1e9, 10.0, *map(float, range(METRICS - 3))]
            values.append((run, tags, params, dict(zip(names, metrics, strict=True))))
        store.executemany(f"INSERT INTO runs ({', '.join(model)}) VALUES ({', '.join('?' * len(model))})", rows)
        for table, at in (("tags", 1), ("params", 2)):
            texts = [(key, value, one[0]) for one in values for key, value in one[at].items()]
            store.executemany(f"INSERT INTO {table} (key, value, run_uuid) VALUES (?, ?, ?)", texts)
        numbers = [(key, value, one[0]) for one in values for key, value in one[3].items()]
        for table in ("metrics", "latest_metrics"):
            known = "INSERT INTO {} (key, value, run_uuid, timestamp, step, is_nan) VALUES (?, ?, ?, 0, 0, 0)"
            store.executemany(known.format(table), numbers)


def _row(store: sqlite3.Connection, query: str, run: str) -> tuple[list[str], tuple[object, ...]]:
    found = store.execute(query, (run,))
    return [column[0] for column in found.description], found.fetchone()


def page_of_two_hundred(folder: Path) -> tuple[float, str]:
    """Size in MB of the page of 200 runs with 200 steps each, and what a browser says about it."""
    rng, steps = generator("page"), np.arange(200)
    frames = [
        pd.DataFrame({"arm": arm, "seed": seed, "step": steps, "acc": 0.9 + 0.01 * i - np.exp(-steps / 20) + rng.normal(0, 0.01, 200)})
        for i, arm in enumerate("abcd")
        for seed in range(50)
    ]
    text = judge(pd.concat(frames), arm="arm", pair="seed", metric="acc", step="step").html()
    (folder / "page.html").write_text(text.replace("</body>", PROBE))
    browser = shutil.which("chromium")
    if browser is None:
        return len(text.encode()) / 1e6, "No Chromium was there to draw it."
    command = [browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--timeout=30000", "--dump-dom", (folder / "page.html").as_uri()]
    times = []
    for _ in range(5):
        shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        times += re.findall(r"<title>drawn after (\d+)", shown)
    best = f"{min(map(int, times))} ms" if times else "more than Chromium waits"
    return len(text.encode()) / 1e6, f"Chromium had drawn it after {best} at best of {len(times)} tries (limit 2 s)."


def _processor_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, nargs="+", default=[1_000, 10_000])
    given = parser.parse_args()
    rows, before = [], os.getloadavg()[0]
    for runs in given.runs:
        with tempfile.TemporaryDirectory() as folder:
            fill(Path(folder), runs)
            anyones = ["runs", f"store={folder}/mlflow.db", "arm=params.arm", "pair=params.seed", "metric=final/test/accuracy"]
            for words in (["sweep=speed"], anyones):
                started, used = time.perf_counter(), _processor_seconds()
                command = [sys.executable, "-m", "esper", "compare", *words, f"output={folder}"]
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
                wall, used = time.perf_counter() - started, _processor_seconds() - used
                rows.append(f"| {runs:,} | `{words[0].partition('=')[0]}` | {wall:.1f} | {used:.1f} | {6 if runs <= 1_000 else 20} |")
                print(rows[-1], flush=True)
    with tempfile.TemporaryDirectory() as folder:
        size, drawn = page_of_two_hundred(Path(folder))
    text = TEXT.format(
        arms=ARMS,
        counts=" ".join(map(str, given.runs)),
        python=platform.python_version(),
        mlflow=mlflow.__version__,
        cores=os.cpu_count(),
        before=before,
        after=os.getloadavg()[0],
        metrics=METRICS,
        params=PARAMS,
        tags=TAGS,
        rows="\n".join(rows),
        size=size,
        drawn=drawn,
    )
    (Path(__file__).parent / "README.md").write_text(text)


if __name__ == "__main__":
    main()
