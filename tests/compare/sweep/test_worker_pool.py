"""Where the jobs of a sweep run: how many processes, and which GPU each of them sees."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from esper.compare.sweep import launch
from esper.compare.sweep import mlflow_process as tracking
from esper.compare.sweep import worker_pool as workers
from esper.compare.sweep.worker_pool import WorkerPool, WorkerProcess, _gpus, worker_environments
from esper.errors import Terminated

pytestmark = pytest.mark.usefixtures("processes")

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
    monkeypatch.setattr(launch, "worker_environments", lambda *given: asked.append(given) or [{}])
    monkeypatch.setattr(launch, "run_sweep", lambda sweep, environments: None)
    monkeypatch.chdir(tmp_path)
    main(["-m", "seed=0,1", "tracking=none", f"trainer.device={device}", "hydra.launcher.workers=5", "hydra.launcher.threads=2"])
    assert asked == [(2, 2, gpu)]


def environment_of(process: int) -> list[bytes]:
    """The variables that a process was started with, once its program has begun."""
    while not (read := Path(f"/proc/{process}/environ").read_bytes()):
        time.sleep(0.01)
    return read.split(b"\0")


def test_every_worker_process_sees_the_gpu_that_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_gpus", lambda: ["4", "GPU-7f"])
    with WorkerPool(worker_environments(0, 2)) as running:
        variables = [environment_of(one._process.pid) for one in running._workers]
    assert [[v for v in one if v.startswith(b"CUDA_VISIBLE_DEVICES=")] for one in variables] == [
        [b"CUDA_VISIBLE_DEVICES=4"],
        [b"CUDA_VISIBLE_DEVICES=GPU-7f"],
    ]
    assert all(b"OMP_NUM_THREADS=2" in one for one in variables)


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
    """Worker processes that a stop signal keeps from answering anything, SIGTERM too."""
    workers = WorkerPool([{}] * count)
    for one in workers._workers:
        while not caught(one._process.pid) >> (signal.SIGTERM - 1) & 1:
            time.sleep(0.01)
        os.kill(one._process.pid, signal.SIGSTOP)
    return workers


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
        raise stop
    assert [one._process.returncode for one in running._workers] == [-signal.SIGKILL] * 3 and not running.saved
    assert len(given) == 3 and given[0] <= 0.2 and given[1:] == [0.0, 0.0], "not so much each"


def test_a_second_ctrl_c_ends_them_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def again(self: WorkerProcess, seconds: float) -> bool:
        raise KeyboardInterrupt

    running = frozen(2)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt), running:
        patch.setattr(WorkerProcess, "wait", again)
        raise KeyboardInterrupt
    assert [one._process.wait() for one in running._workers] == [-signal.SIGKILL] * 2


def test_no_new_process_takes_the_place_of_one_that_was_stopped_over_its_job() -> None:
    (one,) = frozen(1)._workers
    answers: list[Any] = []
    asking = threading.Thread(target=lambda: answers.append(one.ask({"ask": "run"})))
    asking.start()
    process = one._process
    one.stop()
    os.kill(process.pid, signal.SIGCONT)
    asking.join()
    assert one._process is process and one.wait(0.0), "so there is nothing else to wait for"
    assert answers[0]["status"] == "FAILED"
