"""Where the jobs of a sweep run: how many processes, and which GPU each of them sees."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import esper
from esper.cli.compose import compose
from esper.compare.sweep import forks, launch, pools
from esper.compare.sweep import mlflow_process as tracking
from esper.compare.sweep import worker_pool as workers
from esper.compare.sweep.arms import Job
from esper.compare.sweep.forks import ForkServerClient, early_server
from esper.compare.sweep.sweep import PreparedJob
from esper.compare.sweep.worker_pool import WorkerPool, WorkerProcess, _Feeding, _gpus, local_pool, worker_environments
from esper.errors import Terminated, UserError

pytestmark = pytest.mark.usefixtures("processes")

ROOT = str(Path(esper.__file__).resolve().parents[1])
CORES = len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("asked", "seen"), [(0, ["0", "1"]), (1, ["0"]), (2, ["0", "1"]), (5, ["0", "1", "0", "1", "0"])], ids=lambda value: str(value)
)
def test_workers_take_the_gpus_in_turn_and_by_default_one_each(asked: int, seen: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_gpus", lambda: ["0", "1"])
    found = worker_environments(asked, threads=3)
    assert [one["CUDA_VISIBLE_DEVICES"] for one in found] == seen
    assert all(one["OMP_NUM_THREADS"] == one["MKL_NUM_THREADS"] == one["OPENBLAS_NUM_THREADS"] == "3" for one in found)


def test_without_a_gpu_or_without_use_for_one_there_is_a_worker_a_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_gpus", lambda: ["0", "1", "2"])
    assert len(worker_environments(0, 1, gpu=False)) == CORES
    assert not any("CUDA_VISIBLE_DEVICES" in one for one in worker_environments(7, 1, gpu=False))
    monkeypatch.setattr(workers, "_gpus", list)
    assert len(worker_environments(0, 1)) == CORES
    assert not any("CUDA_VISIBLE_DEVICES" in one for one in worker_environments(7, 1))


@pytest.mark.parametrize(("device", "gpu"), [("cpu", False), ("auto", True)])
def test_a_sweep_on_the_cpu_leaves_the_gpus_alone(device: str, gpu: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from esper.app import main

    asked: list[Any] = []
    monkeypatch.setattr(pools, "worker_environments", lambda *given: asked.append(given) or [{}])
    monkeypatch.setattr(pools, "local_pool", lambda environments: None)
    monkeypatch.setattr(launch, "run_sweep", lambda sweep, start: start({}))
    monkeypatch.chdir(tmp_path)
    main(["-m", "seed=0,1", "tracking=none", f"trainer.device={device}", "hydra.launcher.workers=5", "hydra.launcher.threads=2"])
    assert asked == [(2, 2, gpu)]


TELLS = """
import os

from esper.errors import UserError


def told(names):
    raise UserError(" ".join(os.environ.get(name, "unset") for name in names))
"""


def test_every_worker_process_sees_the_gpu_that_is_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_gpus", lambda: ["4", "GPU-7f"])
    (tmp_path / "gpu_teller.py").write_text(TELLS)
    monkeypatch.setenv("ESPER_ALLOW", "gpu_teller")
    monkeypatch.chdir(tmp_path)
    names = "[CUDA_VISIBLE_DEVICES,OMP_NUM_THREADS]"
    config = compose(["tracking=none", "task=custom", "task.target=gpu_teller:told", f"+task.args.names={names}"])
    asked = PreparedJob(Job(0, (), "", "", 0), config, {}, tmp_path).request("describe")
    with local_pool(worker_environments(0, 2)) as running:
        assert [one.ask(asked)["error"] for one in running._workers] == ["4 2", "GPU-7f 2"]


@pytest.mark.parametrize(
    ("visible", "count", "found"),
    [
        (None, 2, ["0", "1"]),
        (None, 0, []),
        ("", 0, []),
        ("-1", 0, []),
        ("-1", 2, []),
        ("NoDevFiles", 2, []),
        ("0, 1", 2, ["0", "1"]),
        ("3,1", 2, ["3", "1"]),
        ("1,-1,0", 1, ["1"]),
        ("0,9", 1, ["0"]),
        ("GPU-8932f937-d72c, MIG-56c30", 2, ["GPU-8932f937-d72c", "MIG-56c30"]),
    ],
)
def test_gpus_are_read_as_cuda_reads_them(
    visible: str | None, count: int, found: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "DRIVER", tmp_path)
    monkeypatch.setattr("torch.cuda.device_count", lambda: count)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert _gpus() == found


def test_without_a_driver_there_is_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "DRIVER", tmp_path / "nothing")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert _gpus() == []


def frozen(count: int) -> WorkerPool:
    """Worker processes that a stop signal keeps from ending."""
    pool = local_pool([{}] * count)
    for process in processes_of(pool):
        while not caught(process) >> (signal.SIGTERM - 1) & 1:
            time.sleep(0.01)
        os.kill(process, signal.SIGSTOP)
    return pool


def processes_of(pool: WorkerPool) -> list[int]:
    """The processes of all workers, once they are there, in the order of the workers."""
    server = pool._server.process.pid
    children = Path(f"/proc/{server}/task/{server}/children")
    while len(found := children.read_text().split()) < len(pool._workers):
        time.sleep(0.01)
    return [int(process) for process in found]


def caught(process: int) -> int:
    """The signals that a process answers itself, a bit each."""
    (line,) = (line for line in Path(f"/proc/{process}/status").read_text().splitlines() if line.startswith("SigCgt:"))
    return int(line.split()[1], 16)


@pytest.mark.parametrize(("stop", "allowed"), [(KeyboardInterrupt, "LEAVE_S"), (Terminated, "SAVE_S")])
def test_all_jobs_together_have_so_much_time_to_end_and_what_does_not_is_killed(
    stop: type[BaseException], allowed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert workers.LEAVE_S + tracking.CLOSE_S < 10.0, "Ctrl-C ends a sweep within ten seconds"
    monkeypatch.setattr(workers, "LEAVE_S", 9000.0)
    monkeypatch.setattr(workers, "SAVE_S", 9000.0)
    monkeypatch.setattr(workers, allowed, 0.2)
    given: list[float] = []
    wait = WorkerProcess.wait
    monkeypatch.setattr(WorkerProcess, "wait", lambda self, seconds: given.append(seconds) or wait(self, seconds))
    with pytest.raises(stop), (running := frozen(3)):
        left = processes_of(running)
        raise stop
    await_end(left)
    assert not running.saved
    assert len(given) == 3 and given[0] <= 0.2 and given[1:] == [0.0, 0.0], "not so much each"


def await_end(processes: Sequence[int]) -> None:
    """Wait until none of the processes is there, or only its exit code is."""
    for process in processes:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            while Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX":
                time.sleep(0.01)


def test_a_second_ctrl_c_ends_them_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def again(self: WorkerProcess, seconds: float) -> bool:
        raise KeyboardInterrupt

    running = frozen(2)
    left = processes_of(running)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt), running:
        patch.setattr(WorkerProcess, "wait", again)
        raise KeyboardInterrupt
    running._server.wait()
    assert all(one.wait(60.0) for one in running._workers)
    await_end(left)


def test_no_new_process_takes_the_place_of_one_that_was_stopped_over_its_job() -> None:
    running = frozen(1)
    (one,), (process,) = running._workers, processes_of(running)
    answers: list[Any] = []
    asking = threading.Thread(target=lambda: answers.append(one.ask({"ask": "run"})))
    asking.start()
    one.stop()
    os.kill(process, signal.SIGCONT)
    asking.join()
    assert one.wait(0.0), "so there is nothing else to wait for"
    assert answers[0]["status"] == "FAILED"
    running.__exit__(None)
    assert running._server.process.returncode == 0


def test_a_worker_that_is_killed_is_replaced_by_another_fork_of_what_was_loaded() -> None:
    with local_pool([{}, {}]) as running:
        server, (killed, other) = running._server.process.pid, processes_of(running)
        os.kill(killed, signal.SIGKILL)
        answer = running.ask({"ask": "run"})
        assert answer["error"] == "the worker process was killed by SIGKILL"
        new = processes_of(running)
        assert other in new and killed not in new and running._server.process.pid == server
    await_end([server, *new])
    assert running.saved


def test_where_the_loaded_process_itself_is_killed_its_jobs_fail_and_the_next_have_a_new_one() -> None:
    with local_pool([{}, {}]) as running:
        server, left = running._server.process.pid, processes_of(running)
        os.kill(server, signal.SIGKILL)
        for one in running._workers:
            assert one.ask({"ask": "run"})["error"] == "the worker process was lost with the one that it was forked from"
        new = processes_of(running)
        assert running._server.process.pid != server and not set(new) & set(left)
        await_end(left)  # they see that nobody waits for their answers
    assert running.saved


def test_workers_end_when_the_sweep_is_killed() -> None:
    script = (
        "import os, time\nfrom esper.compare.sweep.worker_pool import local_pool\n"
        "pool = local_pool([{}, {}])\nprint(pool._server.process.pid, flush=True)\ntime.sleep(600)"
    )
    sweep = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": ROOT})
    assert sweep.stdout is not None
    server = int(sweep.stdout.readline())
    children = Path(f"/proc/{server}/task/{server}/children")
    while len(left := [int(process) for process in children.read_text().split()]) < 2:
        time.sleep(0.01)
    sweep.kill()
    sweep.wait()
    sweep.stdout.close()
    await_end([server, *left])


def test_the_server_that_began_early_is_the_one_whose_forks_do_the_jobs_where_it_fits() -> None:
    with early_server() as begin:
        begin(1)
        early = forks._early
        assert early is not None
        other = forks.server_for([{"OMP_NUM_THREADS": "2"}])
        assert other is not early, "its libraries have read other limits"
        other.close()
        other.wait()
        with local_pool(worker_environments(1, 1, gpu=False)) as running:
            assert running._server is early
            (worker,) = processes_of(running)
            server = Path(f"/proc/{early.process.pid}/task")
            assert len(list(server.iterdir())) == 1, "a fork would be without the other threads"
    await_end([worker, early.process.pid])
    assert running.saved


def test_a_sweep_that_is_refused_leaves_no_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from esper.app import REFUSED, main

    begun: list[ForkServerClient] = []
    start = ForkServerClient._start
    monkeypatch.setattr(ForkServerClient, "_start", lambda self: begun.append(self) or start(self))
    monkeypatch.chdir(tmp_path)
    assert main(["-m", "trainer.steps=10,-3", "tracking=none"]) == REFUSED
    (server,) = begun
    assert server.process.returncode == -signal.SIGTERM and not list(tmp_path.iterdir())


class _LostOnce:
    """A worker that is lost in the middle of its first job, and does the others."""

    def __init__(self) -> None:
        self.asked = 0

    def ask(self, request: dict[str, Any], goes_on: Any = None) -> dict[str, Any]:
        self.asked += 1
        return {"lost": True, "error": "its node was lost"} if self.asked == 1 else {"done": request["job"]}

    def revive(self) -> None:
        """It is there again at once."""


def test_where_all_workers_are_lost_with_their_last_chance_the_jobs_that_are_left_are_still_done() -> None:
    jobs = iter([(number, {"job": number}, None) for number in range(3)])
    worker: Any = _LostOnce()
    feeding = _Feeding([worker], lambda: next(jobs, None), losses=0)
    answers = dict(feeding.run())
    assert answers[0]["lost"] and answers[1] == {"done": 1} and answers[2] == {"done": 2}


class _GivenUp(_LostOnce):
    """A worker that is lost over its first job and never comes back."""

    def revive(self) -> None:
        raise UserError("no node can start it")


def test_a_worker_that_is_given_up_leaves_its_job_to_others_and_where_none_is_left_the_sweep_ends() -> None:
    def jobs() -> Any:
        return iter([(number, {"job": number}, None) for number in range(3)])

    given: Any = jobs()
    workers: list[Any] = [_GivenUp(), _LostOnce()]
    workers[1].asked = 1  # it is lost no more
    feeding = _Feeding(workers, lambda: next(given, None), losses=1)
    assert dict(feeding.run()) == {number: {"done": number} for number in range(3)}
    given = jobs()
    workers = [_GivenUp(), _GivenUp()]
    feeding = _Feeding(workers, lambda: next(given, None), losses=1)
    with pytest.raises(UserError, match="no node can start it"):
        list(feeding.run())
    given = iter([(0, {"job": 0}, None)])
    workers = [_GivenUp()]
    feeding = _Feeding(workers, lambda: next(given, None), losses=0)
    assert [index for index, _ in feeding.run()] == [0], "nothing is left for it to do"
