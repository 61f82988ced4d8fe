"""How long ``esper compare`` takes on a store with many runs; fills a store with made-up runs and times the command.

python experiments/compare_speed/run.py --runs 100 1000
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import mlflow

from esper.compare.results.mlflow_sweep import ARM, BLOCK, KIND, SEED, SWEEP, split_text
from esper.compare.results.plan import Plan
from esper.compare.statistics.random_draws import generator
from esper.tracking.mlflow_store import experiment_id, quiet_client

ARMS = 4
METRICS, PARAMS, TAGS = 55, 6, 15  # of a child of `esper -m seed=0,1 grafting=linear,drift` in its store

TEXT = """# How long does `esper compare` take on a large store?

**Question.** A sweep of {arms} arms in a sqlite store of its own, every run with the {metrics} metrics, {params} parameters and {tags} tags
that a run of the default sweep has: how long does it take from the command to the written figures?

**Command.** `python experiments/compare_speed/run.py --runs {counts}` (Python {python}, MLflow {mlflow}, {cores} cores;
load average of the last minute {before:.1f} when it began and {after:.1f} when it ended: the cores were shared with other
programs as far as this exceeds 1). This file is written by it.

| runs in the store | seconds, whole command | processor time of it | limit |
|---|---|---|---|
{rows}
"""


def fill(folder: Path, runs: int) -> None:
    """A parent and ``runs`` children with the tags and metrics that a sweep writes."""
    from mlflow.entities import Metric, Param, RunTag

    uri = f"sqlite:///{folder}/mlflow.db"
    client, rng = quiet_client(uri), generator("speed", runs)
    experiment = experiment_id(client, uri, "esper")
    seeds = tuple(range(runs // ARMS))
    arms = {f"arm{i}": {"x": i} for i in range(ARMS)}
    plan = Plan("accuracy", "max", 0.01, 0.05, 0.8, 0.0, "arm0", arms, seeds)
    parent = client.create_run(experiment, tags={KIND: "sweep", SWEEP: "speed", **split_text(plan.text())}, run_name="speed")
    for arm in arms:
        for seed in seeds:
            tags = {SWEEP: "speed", ARM: arm, BLOCK: "", SEED: str(seed), "mlflow.parentRunId": parent.info.run_id}
            run = client.create_run(experiment, tags=tags, run_name=f"{arm} seed={seed}").info.run_id
            values = {"final/test/accuracy": rng.normal(0.9, 0.01), "final/cost/macs": 1e9, "final/cost/seconds": 10.0}
            values |= {f"curve/{i}": float(i) for i in range(METRICS - len(values))}
            metrics = [Metric(name, float(value), 0, 0) for name, value in values.items()]
            params = [Param("arm", arm), *(Param(f"made.up.{i}", "1") for i in range(PARAMS - 1))]
            more = [RunTag(f"note.{i}", "made up") for i in range(TAGS - len(tags))]
            client.log_batch(run, metrics=metrics, params=params, tags=more)
            client.set_terminated(run)


def _processor_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, nargs="+", default=[100, 1000])
    given = parser.parse_args()
    rows, before = [], os.getloadavg()[0]
    for runs in given.runs:
        with tempfile.TemporaryDirectory() as folder:
            fill(Path(folder), runs)
            started, used = time.perf_counter(), _processor_seconds()
            command = [sys.executable, "-m", "esper", "compare", "sweep=speed", f"output={folder}"]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            wall, used = time.perf_counter() - started, _processor_seconds() - used
            rows.append(f"| {runs} | {wall:.1f} | {used:.1f} | {10 if runs <= 100 else 30} |")
            print(rows[-1], flush=True)
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
    )
    (Path(__file__).parent / "README.md").write_text(text)


if __name__ == "__main__":
    main()
