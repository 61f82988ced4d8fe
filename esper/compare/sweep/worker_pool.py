"""The worker processes of a sweep, each of which runs one job after another."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import esper
from esper.compare.sweep.worker import SAVED
from esper.errors import Terminated

DRIVER = Path("/proc/driver/nvidia")
_DEVICE = re.compile(r"\d+|(GPU|MIG)-\S+")
SAVE_S = 25.0  # how long all jobs together may take to save their state after a scheduler's SIGTERM, which leaves 30 s
LEAVE_S = 4.0  # and after Ctrl-C, where the user waits: a job that is killed then resumes from its newest checkpoint
Request = dict[str, Any]
Answer = dict[str, Any]


class WorkerProcess:
    """One process; ``ask`` blocks its caller until the answer is there."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = dict(environment)
        self._lock = threading.Lock()
        self._over = False
        self._process = self._start()

    def _start(self) -> subprocess.Popen[str]:
        root = str(Path(esper.__file__).resolve().parents[1])
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
        return subprocess.Popen(
            [sys.executable, "-m", "esper.compare.sweep.worker", str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": path} | self._environment,
            start_new_session=True,  # Ctrl-C in the terminal reaches the sweep alone
        )

    def ask(self, request: Request) -> Answer:
        """The answer; a process that dies over a job has failed it, and the next job gets a new process."""
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # the empty answer below tells the same
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
        line = process.stdout.readline()
        if line:
            answer: Answer = json.loads(line)
            return answer
        code = process.wait()
        with self._lock:
            if not self._over:
                self._process = self._start()
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        return {"status": "FAILED", "error": f"the worker process {how}", "seconds": 0.0}

    def stop(self) -> None:
        """Send SIGTERM, which ends the run under way; no other process takes its place."""
        with self._lock:
            self._over = True
            self._process.terminate()

    def wait(self, seconds: float) -> bool:
        """Wait for the process to end, and kill it after ``seconds``; whether its job has saved its state."""
        try:
            code = self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            code = self._process.wait()
        for pipe in filter(None, (self._process.stdin, self._process.stdout)):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
        return code in (0, SAVED, -signal.SIGTERM)  # the last one had not even begun to listen

    def kill(self) -> None:
        """Kill the process at once."""
        self._process.kill()


class WorkerPool:
    """As many workers as there are environments. Use as a context: leaving it ends the processes.

    ``saved`` tells afterwards whether every job that was under way has saved its state.
    """

    def __init__(self, environments: Sequence[Mapping[str, str]]) -> None:
        self._workers = [WorkerProcess(environment) for environment in environments]
        self._stopping = False
        self.saved = False

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._stopping = True
        for worker in self._workers:
            worker.stop()
        deadline = time.monotonic() + (LEAVE_S if interrupted_by_user(kind) else SAVE_S)
        try:
            saved = [worker.wait(max(0.0, deadline - time.monotonic())) for worker in self._workers]
        except KeyboardInterrupt:  # a second one
            for worker in self._workers:
                worker.kill()
            raise
        self.saved = all(saved)

    def ask(self, request: Request) -> Answer:
        """One answer from the first worker; for use before and after, not while jobs run."""
        return self._workers[0].ask(request)

    def run(self, requests: Sequence[Request], started: Callable[[int], None] = lambda index: None) -> Iterator[tuple[int, Answer]]:
        """Run all requests, as many at once as there are workers; yields (index, answer) as they come in.

        Ending the iteration early drops the requests that have not begun and waits for those that have.
        """
        waiting = deque(enumerate(requests))
        answers: queue.SimpleQueue[tuple[WorkerProcess, int, Answer]] = queue.SimpleQueue()
        busy = 0

        def begin(worker: WorkerProcess) -> int:
            if not waiting:
                return 0
            index, request = waiting.popleft()
            started(index)
            threading.Thread(target=lambda: answers.put((worker, index, worker.ask(request))), daemon=True).start()
            return 1

        busy += sum(begin(worker) for worker in self._workers)
        try:
            while busy:
                worker, index, answer = _next(answers)
                busy += begin(worker) - 1
                yield index, answer
        except GeneratorExit:
            waiting.clear()
            while busy and not self._stopping:
                _next(answers)
                busy -= 1
            raise


def interrupted_by_user(kind: type[BaseException] | None) -> bool:
    """Whether this exception is that of Ctrl-C."""
    return kind is not None and issubclass(kind, KeyboardInterrupt) and not issubclass(kind, Terminated)


def _next(answers: queue.SimpleQueue[tuple[WorkerProcess, int, Answer]]) -> tuple[WorkerProcess, int, Answer]:
    """The next answer; wakes up now and then so that Ctrl-C is seen while waiting."""
    while True:
        with contextlib.suppress(queue.Empty):
            return answers.get(timeout=0.5)


def worker_environments(workers: int, threads: int, gpu: bool = True) -> list[dict[str, str]]:
    """One environment a worker: one worker per GPU where there are any, else one per core.

    Args:
        workers: how many; 0 means as many as GPUs or cores. More than there are GPUs share them in turn.
        threads: CPU threads of libraries other than torch in each.
        gpu: whether the jobs may use one.
    """
    gpus = _gpus() if gpu else []
    count = workers or len(gpus) or len(os.sched_getaffinity(0))
    shared = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "OPENBLAS_NUM_THREADS": str(threads)}
    return [shared | ({"CUDA_VISIBLE_DEVICES": gpus[i % len(gpus)]} if gpus else {}) for i in range(count)]


def _gpus() -> list[str]:
    """The GPUs that this process may use, without importing torch where there is no NVIDIA driver.

    As CUDA reads ``CUDA_VISIBLE_DEVICES``: the first word that names no device (``-1``, ``NoDevFiles``) and all after it are hidden.
    """
    if not DRIVER.exists():
        return []
    import torch

    count = torch.cuda.device_count()  # knows which of the words are real; 0 where torch was built without CUDA
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return [str(index) for index in range(count)]
    return list(itertools.takewhile(_DEVICE.fullmatch, (word.strip() for word in visible.split(","))))[:count]
