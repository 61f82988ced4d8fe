"""`scripts/bench cluster`: what the servers of a sweep take on this machine, and what Ray's launcher adds, for docs/cluster.md.

Parts: `bus`, records through a bus server on one core; `rows`, rows of metrics into MLflow's databases, directly and through a server;
`runs`, a sweep of default runs through an MLflow server, with what each leaves in the database; `launchers`, short jobs of a sweep with
hydra/launcher=local and on a Ray cluster of four nodes. A machine that is busy with other things spoils all of it: look at the load. It
shares its processors out among sessions, of which every node of the Ray cluster is one, so that only processor times can be compared then.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import os
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from scripts.benchmarks._machine import machine
from scripts.cluster_servers import answers, mlflow, postgresql, postgresql_uri

LIMIT = 1.10
ROOT = Path(__file__).resolve().parents[2]
STORES = ("sqlite", "postgresql")
KEYS = 50  # names of metrics in a batch, 20 steps of each: as a run sends them
SHORT = ("debug=tiny", "tracking=csv", "compare.figures=false")


@dataclass
class Row:
    """One line: what was measured and how, and on what machine at what load."""

    measure: str
    value: float
    unit: str
    how: str
    load: float = 0.0
    cores: int = 0
    python: str = ""
    torch: str = ""
    ray: str = ""
    mlflow: str = ""

    def __post_init__(self) -> None:
        for key, value in machine("ray", "mlflow").items():
            if hasattr(self, key):
                setattr(self, key, value)
        self.value = float(f"{self.value:.4g}")


def environment() -> dict[str, str]:
    """The variables of a sweep, or of one that writes: this checkout's esper, and one thread."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    return os.environ | {"PYTHONPATH": path, "MLFLOW_DISABLE_TELEMETRY": "true", "GIT_PYTHON_REFRESH": "quiet"}


@contextmanager
def store(kind: str, folder: Path) -> Iterator[str]:
    """The address of a new database."""
    if kind == "sqlite":
        yield f"sqlite:///{folder / 'mlflow.db'}"
        return
    with postgresql(folder / "postgresql") as (place, _):
        yield postgresql_uri(place)


@contextmanager
def server(folder: Path, uri: str) -> Iterator[str]:
    """The address of an MLflow server of one process on this database, once it answers."""
    with mlflow(folder, uri) as (host, number):
        while not answers(host, number):
            time.sleep(0.1)
        yield f"http://{host}:{number}"


def bytes_and_rows(uri: str) -> tuple[int, int]:
    """Bytes of the database, and how many rows of metrics it has."""
    count = "SELECT count(*) FROM metrics"
    if uri.startswith("sqlite"):
        file = Path(uri.removeprefix("sqlite:///"))
        with contextlib.closing(sqlite3.connect(file)) as database:
            return file.stat().st_size, database.execute(count).fetchone()[0]
    from sqlalchemy import create_engine, text

    with contextlib.closing(create_engine(uri).connect()) as database:
        size = database.execute(text("SELECT pg_database_size(current_database())")).scalar_one()
        return int(size), int(database.execute(text(count)).scalar_one())


# --- bus ---


def bus_rates() -> Iterator[Row]:
    """With the quickest codec and the densest one."""
    from scripts.benchmarks.bus import throughput, training_rows

    rows = training_rows(256)
    for codec in ("raw", "rounded"):
        found = [throughput.end_to_end(rows, codec, 2000) for _ in range(3)]
        clock, used = (statistics.median(values) for values in zip(*found, strict=True))
        yield Row(f"bus, {codec}", clock, "seed-records/s", "trainer, server and reader on one core, by the clock; median of 3")
        yield Row(f"bus, {codec}, processor", used, "seed-records/s", "the same, a second of processor time: without what else runs here")


# --- rows ---


def write(uri: str, batches: int) -> int:
    """Write so many batches of 1,000 metrics to a run of its own, once told to, and print the seconds."""
    from mlflow.entities import Metric

    from esper.tracking.mlflow_store import experiment_id, quiet_client

    client = quiet_client(uri)
    run = client.create_run(experiment_id(client, uri, "bench")).info.run_id
    for batch in range(batches + 1):
        if batch == 1:  # the first one, after which server and database have loaded what they need, is not measured
            print("ready", flush=True)
            sys.stdin.readline()
            began = time.perf_counter()
        steps = range(batch * 1000 // KEYS, (batch + 1) * 1000 // KEYS)
        client.log_batch(run, metrics=[Metric(f"layer/{key}", 0.1 * key, 1000 + step, step) for step in steps for key in range(KEYS)])
    print(time.perf_counter() - began, flush=True)
    return 0


def rate_of(uri: str, writers: int, batches: int) -> float:
    """Rows a second of so many processes that write at once; they begin together."""
    command = [sys.executable, "-m", "scripts.benchmarks.cluster", uri, str(batches)]
    kinds: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": ROOT, "env": environment()}
    processes = [subprocess.Popen(command, **kinds)]
    assert processes[0].stdout is not None and processes[0].stdout.readline() == "ready\n"  # the tables are made by one
    processes += [subprocess.Popen(command, **kinds) for _ in range(writers - 1)]
    assert all(one.stdout is not None and one.stdout.readline() == "ready\n" for one in processes[1:])
    for one in processes:
        assert one.stdin is not None
        one.stdin.write("go\n")
        one.stdin.flush()
    seconds = [float(one.communicate()[0]) for one in processes]
    return writers * batches * 1000 / max(seconds)


def row_rates(batches: int) -> Iterator[Row]:
    """Rows of metrics: each database directly, and behind a server of one process."""
    for kind in STORES:
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            uri = stack.enter_context(store(kind, folder))
            yield Row(f"{kind}, 1 writer", rate_of(uri, 1, batches), "rows/s", f"{batches} batches of 1,000 metrics")
            if kind == "postgresql":
                yield Row(f"{kind}, 4 writers", rate_of(uri, 4, batches), "rows/s", f"4 processes with {batches} batches each")
            address = stack.enter_context(server(folder, uri))
            for writers in (1, 4):
                rate = rate_of(address, writers, batches)
                yield Row(f"server on {kind}, {writers} writer{'s' * (writers > 1)}", rate, "rows/s", "through mlflow server --workers 1")


# --- runs ---


def run_sizes(jobs: int) -> Iterator[Row]:
    """A sweep of default runs, without controls, through a server on each database."""
    from esper.tracking.mlflow_store import quiet_client

    for kind in STORES:
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            uri = stack.enter_context(store(kind, folder))
            quiet_client(uri)
            before, _ = bytes_and_rows(uri)
            words = [f"tracking.uri={stack.enter_context(server(folder, uri))}", "trainer.control=false", "compare.figures=false"]
            seconds = sweep(words, jobs, os.cpu_count() or 1, environment()).clock
            after, count = bytes_and_rows(uri)
            how = f"{jobs} default runs through a server, {os.cpu_count()} at once"
            yield Row(f"size of a run, {kind}", (after - before) / jobs / 1e6, "MB", how)
            yield Row(f"rows of a run, {kind}", count / jobs, "rows", how)
            yield Row(f"runs, {kind}", jobs / seconds, "runs/s", f"{how}; from the command to the verdict")


# --- launchers ---


@dataclass
class Sweep:
    """Seconds of one sweep: by the clock, by the clock beside the step loops, which are shared out among the workers, and of processors."""

    clock: float
    beside: float
    processor: float


class Used(threading.Thread):
    """Processor time of everything below these processes, until :meth:`end`, looked at once a second.

    The system's own sums would not do: Ray's processes leave no account of their children that have ended.
    """

    def __init__(self, *roots: int) -> None:
        super().__init__(daemon=True)
        self.roots = [psutil.Process(root) for root in roots]
        self.before, self.seen = self._look(), dict[psutil.Process, float]()
        self.over = threading.Event()
        self.start()

    def run(self) -> None:
        """Look, until it is over."""
        while not self.over.wait(1.0):
            self.seen |= self._look()

    def end(self) -> float:
        """Seconds of processors since the beginning."""
        self.over.set()
        self.join()
        return sum(seconds - self.before.get(one, 0.0) for one, seconds in self.seen.items())

    def _look(self) -> dict[psutil.Process, float]:
        found = {}
        for root in self.roots:
            with contextlib.suppress(psutil.NoSuchProcess):
                for one in [root, *root.children(recursive=True)]:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        found[one] = sum(one.cpu_times()[:2])
        return found


def sweep(words: list[str], jobs: int, workers: int, variables: dict[str, str], keeper: int = 0) -> Sweep:
    """Run a sweep of so many seeds. On a cluster all that its processes do meanwhile is counted."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "esper", "-m", f"seed=range(0,{jobs})", f"output={folder}", *words]
        began = time.monotonic()
        process = subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        used = Used(*filter(None, (process.pid, keeper)))
        said = process.communicate()[0]
        seconds, processor = time.monotonic() - began, used.end()
        found = [json.loads(path.read_text(encoding="utf-8")) for path in Path(folder).glob("sweeps/*/*/*/summary.json")]
    if process.returncode or len(found) != jobs:
        raise SystemExit(f"{len(found)} of {jobs} jobs ended:\n{said[-4000:]}")
    return Sweep(seconds, seconds - sum(one["seconds"]["total"] for one in found) / workers, processor)


def launchers(jobs: int, workers: int, repeats: int) -> Iterator[Row]:
    """The same sweep with both launchers, in turns; the last rows are Ray's time over the local launcher's."""
    with tempfile.TemporaryDirectory() as folder:
        script = [sys.executable, str(ROOT / "scripts" / "cluster_servers.py")]
        subprocess.run([*script, "up", "--folder", folder, "--nodes", str(workers)], env=environment(), check=True, stdout=sys.stderr)
        try:
            host, number = json.loads((Path(folder) / "cluster.json").read_text(encoding="utf-8"))["servers"]["ray"]
            keeper = int((Path(folder) / "lock").read_text(encoding="utf-8"))
            variables = environment() | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(Path(folder) / "ray-token")}
            ways = {
                "local": ([*SHORT, f"hydra.launcher.workers={workers}"], 0),
                "ray": ([*SHORT, "hydra/launcher=ray", f"hydra.launcher.address={host}:{number}"], keeper),
            }
            found: dict[str, list[Sweep]] = {name: [] for name in ways}
            for _ in range(repeats):
                for name, (words, of) in ways.items():
                    found[name].append(sweep(words, jobs, workers, variables, of))
                    print(name, found[name][-1], file=sys.stderr, flush=True)
        finally:
            subprocess.run([*script, "down", "--folder", folder], env=environment(), check=True, stdout=sys.stderr)
    how = f"{jobs} short jobs, {workers} workers, sweeps with each in turns: {repeats}"
    for key, told in (("clock", ""), ("beside", ", beside the step loops"), ("processor", ", processor time")):
        medians = {name: statistics.median(getattr(one, key) for one in some) for name, some in found.items()}
        for name, seconds in medians.items():
            yield Row(f"sweep, {name}{told}", seconds, "s", how)
        if key != "beside":
            yield Row(f"sweep{told}, ray ÷ local", medians["ray"] / medians["local"], "×", f"{how}; limit {LIMIT}")


def main(arguments: list[str]) -> int:
    """Print the rows and write them to ``--out``; 1 when Ray's sweep took more than a tenth longer than the local one."""
    parser = argparse.ArgumentParser(prog="scripts/bench cluster", description=__doc__)
    parser.add_argument("--only", choices=("bus", "rows", "runs", "launchers"), help="one part; the others keep their rows in the file")
    parser.add_argument("--batches", type=int, default=50, help="of 1,000 metrics, that each writer sends (50)")
    parser.add_argument("--runs", type=int, default=6, help="default runs of the sweeps through a server (6)")
    parser.add_argument("--jobs", type=int, default=64, help="short jobs of the sweeps with both launchers (64)")
    parser.add_argument("--workers", type=int, default=4, help="workers of both launchers (4)")
    parser.add_argument("--repeats", type=int, default=3, help="sweeps with each launcher (3)")
    parser.add_argument("--out", type=Path, default=Path("outputs/bench/cluster.csv"), help="where the CSV goes")
    options = parser.parse_args(arguments)
    parts = {
        "bus": bus_rates,
        "rows": lambda: row_rates(options.batches),
        "runs": lambda: run_sizes(options.runs),
        "launchers": lambda: launchers(options.jobs, options.workers, options.repeats),
    }
    rows: list[Row] = []
    for name, part in parts.items():
        for row in part() if options.only in (None, name) else ():
            print(f"{row.measure:40} {row.value:12,.4g} {row.unit:15} load {row.load:<5} {row.how}", flush=True)
            rows.append(row)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    kept: list[dict[str, Any]] = []
    if options.only and options.out.exists():
        measured = {row.measure for row in rows}
        kept = [row for row in csv.DictReader(options.out.open(encoding="utf-8")) if row["measure"] not in measured]
    with options.out.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(Row.__dataclass_fields__))
        writer.writeheader()
        writer.writerows([*kept, *(asdict(row) for row in rows)])
    return int(any(row.measure.endswith("÷ local") and row.value > LIMIT for row in rows))


if __name__ == "__main__":
    sys.exit(write(sys.argv[1], int(sys.argv[2])))
