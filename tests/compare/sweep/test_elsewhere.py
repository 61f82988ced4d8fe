"""Sweeps whose jobs run elsewhere: on the nodes of a Ray cluster, as jobs of submitit's."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from esper.cli.compose import compose
from esper.cli.launchers import RayConfig, SubmititConfig
from esper.compare.sweep.ray_pool import room
from esper.compare.sweep.submitit_pool import BatchWorker, executor_for
from esper.errors import UserError
from esper.report.summary_file import read_summary
from esper.running.run import run

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "120"}
STEPS = 500  # long enough not to be over when a busy machine comes to take a node away
WORDS = ("trainer.control=false", "trainer.checkpoint_every=2%", "telemetry.every=5", "tracking=csv", "controller=random")
WORDS += (f"trainer.steps={STEPS}", "controller.earliest=5%", "controller.latest=40%")


def begin(*words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "esper", *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENVIRONMENT)


def until(happened: Callable[[], object], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not happened():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.02)


def jobs(folder: Path) -> list[Path]:
    return sorted(path.parent for path in folder.glob("sweeps/*/*/*/job.log"))


def saving(folder: Path, count: int) -> bool:
    """Whether so many jobs have begun, each with a checkpoint."""
    found = jobs(folder)
    return len(found) == count and all(any((one / "checkpoints").glob("[0-9]*")) for one in found)


class Cluster:
    """The servers of ``scripts/cluster``."""

    def __init__(self, folder: Path, checkout: Path) -> None:
        self.script = [sys.executable, str(checkout / "scripts" / "cluster_servers.py")]
        self.folder = folder

    def ask(self, what: str, *options: str) -> tuple[int, str]:
        command = [*self.script, what, "--folder", str(self.folder), *options]
        done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, check=False)
        return done.returncode, done.stdout + done.stderr

    def rows_in_postgresql(self) -> int:
        """How many runs its database has; its socket is for this account alone."""
        import psycopg2

        place = json.loads((self.folder / "cluster.json").read_text())["servers"]["database"][0]
        assert Path(place).stat().st_mode & 0o077 == 0
        with contextlib.closing(psycopg2.connect(host=place, dbname="postgres")) as database, database.cursor() as cursor:
            cursor.execute("SELECT count(*), (SELECT setting FROM pg_settings WHERE name = 'listen_addresses') FROM runs")
            count, addresses = cursor.fetchone()
        assert addresses == "", "no port is open"
        return int(count)

    def lose_a_node(self) -> None:
        """Kill the process that makes a node one; Ray's other processes on it end with it."""
        keeper = int((self.folder / "lock").read_text())
        children = Path(f"/proc/{keeper}/task/{keeper}/children").read_text().split()
        os.kill(max(int(one) for one in children if Path(f"/proc/{one}/comm").read_text().strip() == "raylet"), signal.SIGKILL)


@pytest.fixture
def cluster(processes: None, heavy_libraries: None, tmp_path: Path, checkout: Path) -> Iterator[Cluster]:
    """A real Ray cluster, real MLflow, PostgreSQL and bus servers, once they are up."""
    found = Cluster(tmp_path / "cluster", checkout)
    yield found
    found.ask("down")


@pytest.mark.parametrize(
    ("cpus", "gpus", "fit"),
    [
        (4.0, 2.0, (2, 0, 0)),  # the cluster has 12 CPUs and 8 GPUs, and one node both together
        (1.0, 0.0, (8, 3, 1)),
        (0.1, 0.0, (80, 30, 10)),
        (0.0, 1.0, (4, 4, 0)),
        (0.0, 0.6, (4, 4, 0)),  # two such shares are more than one GPU
        (0.0, 0.5, (8, 8, 0)),
        (4.0, 0.0, (2, 0, 0)),
    ],
)
def test_a_worker_has_room_on_one_node_or_none(cpus: float, gpus: float, fit: tuple[int, ...]) -> None:
    nodes = [{"CPU": 8.0, "GPU": 4.0, "memory": 1e9}, {"CPU": 3.0, "GPU": 4.0}, {"CPU": 1.0}]
    assert tuple(room(node, RayConfig(cpus=cpus, gpus=gpus)) for node in nodes) == fit


def test_one_and_a_half_gpus_are_refused() -> None:
    with pytest.raises(UserError, match="a share of one GPU"):
        RayConfig(gpus=1.5)


NO_WORKER = """
import sys
from esper.cli.launchers import RayConfig
from esper.compare.sweep.ray_pool import RayWorker, ray_pool
from esper.compare.sweep.worker_pool import WorkerPool
from esper.errors import UserError

address = sys.argv[1]
try:
    ray_pool(RayConfig(address=address, cpus=2.0), 1)
except UserError as error:
    print(error)
pool = ray_pool(RayConfig(address=address), 1)
pool._workers = [RayWorker(RayConfig(address=address, lost=1), {"ESPER_IT": "no\\0text"})]
print(pool.ask({"ask": "describe"})["error"])
try:
    with pool:
        list(pool.run([{"ask": "run"}]))
except UserError as error:
    print(error)
"""


def refusals_of(address: str) -> None:
    """What no worker of the cluster can do, or may."""
    said = subprocess.run([sys.executable, "-c", NO_WORKER, address], env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    told = said.stdout.splitlines()
    assert len(told) == 3, said.stdout + said.stderr
    assert told[0].startswith("No node of the Ray cluster has room for a worker of 2 CPUs and 0 GPUs: its largest have 1 CPUs and ")
    assert "a node could not start its worker (ValueError: embedded null byte)" in told[1]
    assert told[2].startswith("A worker of the Ray cluster did not come up in 2 tries: a node could not start its worker")
    for wrong in ({"RAY_AUTH_TOKEN_PATH": "", "RAY_AUTH_TOKEN": "another"}, {"RAY_AUTH_TOKEN_PATH": "/no/such/file"}):
        words = ["-m", "seed=0,1", "tracking=none", "hydra/launcher=ray", f"hydra.launcher.address={address}"]
        refused = subprocess.run(
            [sys.executable, "-m", "esper", *words], env=ENVIRONMENT | wrong, capture_output=True, text=True, timeout=120
        )
        assert refused.returncode == 2 and "asks for its token and was given none, or another one" in refused.stderr, refused.stderr
        assert "Traceback" not in refused.stderr


@pytest.mark.e2e
def test_the_job_of_a_lost_node_goes_on_elsewhere_and_every_result_counts_once(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, said = cluster.ask("up", "--nodes", "2", "--store", "postgresql")
    assert code == 0 and said.count(" answers") == 4, said
    assert (cluster.folder / "ray-token").stat().st_mode & 0o077 == 0
    told = [line for line in said.splitlines() if not line.startswith("#")]
    password = subprocess.run(["bash", "-c", f"{told[1]}; printenv ESPER_BUS_PASSWORD"], capture_output=True, text=True, check=True)
    for key, value in {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(cluster.folder / "ray-token")}.items():
        monkeypatch.setitem(ENVIRONMENT, key, value)
    monkeypatch.setitem(ENVIRONMENT, "ESPER_BUS_PASSWORD", password.stdout.strip())
    refusals_of(next(word for word in told[2].split() if word.startswith("hydra.launcher.address=")).partition("=")[2])
    shared = [word for word in WORDS if not word.startswith("tracking=")]
    words = [*shared, *told[2].split()[3:], "tracking.system_s=0"]
    process = begin("-m", "seed=0,1,2", *words, f"output={tmp_path}")
    until(lambda: saving(tmp_path, 2), process)
    cluster.lose_a_node()
    said = process.communicate(timeout=180)[0]
    assert process.returncode == 0, said
    found = jobs(tmp_path)
    again = [one for one in found if "going on after step" in (one / "job.log").read_text()]
    assert len(again) == 1, "the job of the node that was lost, and no other"
    run(compose([*WORDS, f"seed={found.index(again[0])}", f"output={tmp_path}"]), tmp_path / "whole", quiet=True)
    assert read_summary(again[0])["fingerprint"] == read_summary(tmp_path / "whole")["fingerprint"]
    assert kept(next(word for word in words if word.startswith("tracking.uri=")).removeprefix("tracking.uri=")) == 3
    assert cluster.rows_in_postgresql() == 4
    code, said = cluster.ask("down")
    assert code == 0 and "It is down." in said
    assert cluster.ask("status")[0] == 1


def test_a_database_with_a_password_in_its_address_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from scripts.cluster_servers import main

    for store in ("postgresql+psycopg2://me:hush-hush@host/runs", "postgres", "mysql"):
        assert main(["up", "--folder", str(tmp_path / "cluster"), "--store", store]) == 2
        said = capsys.readouterr().err
        assert "--store is sqlite, postgresql, or an address without a password" in said and "hush" not in said
    assert not (tmp_path / "cluster").exists()


def kept(uri: str) -> int:
    """How many runs the server has below the one sweep, all of which finished."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(uri)
    found = client.search_runs([client.get_experiment_by_name("esper").experiment_id])
    assert {one.info.status for one in found} == {"FINISHED"}
    parents = [one.data.tags.get("mlflow.parentRunId") for one in found]
    assert parents.count(None) == 1 and len(set(parents)) == 2
    return len(found) - 1


def test_a_stopped_sweep_of_submitits_jobs_saves_them_and_goes_on(processes: None, whole_runs: None, tmp_path: Path) -> None:
    sweep = ("-m", "seed=0,1", *WORDS, f"output={tmp_path}")
    process = begin(*sweep, "hydra/launcher=submitit", "hydra.launcher.cluster=local", "hydra.launcher.workers=2")
    until(lambda: saving(tmp_path, 2), process)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 75, said
    stopped = [read_summary(one)["steps"] for one in jobs(tmp_path)]
    assert all(0 < steps < STEPS for steps in stopped)
    again = begin(*sweep, "resume=auto", "hydra.launcher.workers=2")  # on this machine now: where a job runs makes no other sweep
    said = again.communicate(timeout=120)[0]
    assert again.returncode == 0, said
    assert "seed=0 goes on from its newest checkpoint" in said and "seed=1 goes on from its newest checkpoint" in said
    assert [read_summary(one)["status"] for one in jobs(tmp_path)] == ["FINISHED", "FINISHED"]


def test_slurm_is_sent_what_was_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "srun").write_text("#!/bin/sh\n")
    (tmp_path / "srun").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    settings = SubmititConfig(
        timeout_min=90, cpus=4, gpus=1, memory_gb=16, partition="long", account="lab", qos="low", constraint="a100|h100"
    )
    executor = executor_for(settings, tmp_path)._executor
    script = executor._make_submission_file_text(executor._submitit_command_str, "id").splitlines()
    for line in ("time=90", "cpus-per-task=4", "gpus-per-node=1", "mem=16GB", "partition=long", "account=lab", "qos=low", "nodes=1"):
        assert f"#SBATCH --{line}" in script
    assert "#SBATCH --constraint=a100|h100" in script or "#SBATCH --constraint='a100|h100'" in script
    assert "#SBATCH --requeue" in script, "where a node dies, Slurm runs the job again"
    assert any(line.startswith("#SBATCH --signal=USR2@") for line in script), "so that it saves its state before the time limit"
    assert any(line.startswith("srun ") and "submitit.core._submit" in line for line in script)


SLURM = {
    "srun": "exit 1",
    "sbatch": "echo Submitted batch job $NUMBER",
    "scancel": "echo $1 >> $HERE/cancelled",
    "sacct": 'echo "JobID|State|NodeList"; [ -e $HERE/cancelled ] && echo "$NUMBER|CANCELLED|" || echo "$NUMBER|$STATE|"',
}


@pytest.mark.parametrize("begun", [False, True])
def test_a_job_that_is_cancelled_in_the_queue_has_nothing_to_save(
    begun: bool, processes: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from submitit.slurm.slurm import SlurmInfoWatcher, SlurmJob

    for name, line in SLURM.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    variables = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "HERE": str(tmp_path), "NUMBER": str(4711 + begun)}
    monkeypatch.setattr(SlurmJob, "watcher", SlurmInfoWatcher(delay_s=0))
    monkeypatch.setattr(SlurmJob, "_results_timeout_s", 0.0)
    for key, value in (variables | {"STATE": "RUNNING" if begun else "PENDING"}).items():
        monkeypatch.setenv(key, value)
    worker = BatchWorker(SubmititConfig(), executor_for(SubmititConfig(), tmp_path), {}, threading.Lock())
    asking = threading.Thread(target=worker.ask, args=({"ask": "run"},))
    asking.start()
    while worker._job is None:
        time.sleep(0.01)
    if begun:  # and killed before it could save
        (worker._job.paths.folder / f"{variables['NUMBER']}_begun").touch()
    worker.stop()
    assert worker.wait(60.0)
    asking.join()
    assert worker.saved is not begun
    assert (tmp_path / "cancelled").read_text().split() == [variables["NUMBER"]]


def test_nothing_of_a_setting_becomes_a_line_of_the_script() -> None:
    with pytest.raises(UserError, match="partition"):
        SubmititConfig(partition="long\nrm -r /")


@pytest.mark.slow
def test_without_slurm_or_a_cluster_a_sentence_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from esper.app import REFUSED, main

    monkeypatch.chdir(tmp_path)
    assert main(["-m", "seed=0,1", "hydra/launcher=submitit"]) == REFUSED
    assert "cannot write to one file of SQLite" in capsys.readouterr().err
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"no srun on the PATH"):
        executor_for(SubmititConfig(), tmp_path)


def test_what_slurm_refuses_is_a_failed_job_with_slurms_own_words() -> None:
    from submitit.core.utils import FailedJobError

    def refuse(*given: Any) -> Any:
        raise FailedJobError("sbatch: error: invalid partition specified: gpus")

    worker = BatchWorker(SubmititConfig(), SimpleNamespace(submit=refuse), {}, threading.Lock())
    answer = worker.ask({"ask": "run"})
    assert answer["status"] == "FAILED" and "invalid partition specified: gpus" in answer["error"]
