"""The worker processes of a sweep, each of which runs one job after another."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import queue
import re
import signal
import socket
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from esper.compare.sweep.forks import Fork, ForkServerClient, server_for, thread_limits
from esper.compare.sweep.worker import SAVED
from esper.errors import Terminated

DRIVER = Path("/proc/driver/nvidia")
_DEVICE = re.compile(r"\d+|(GPU|MIG)-\S+")
SAVE_S = 25.0  # how long all jobs together may take to save their state after a scheduler's SIGTERM, which leaves 30 s
LEAVE_S = 4.0  # and after Ctrl-C, where the user waits: a job that is killed then resumes from its newest checkpoint
Request = dict[str, Any]
Answer = dict[str, Any]
GoesOn = Callable[[dict[str, Any]], bool]
Given = tuple[int, Request, GoesOn | None]


class Worker(Protocol):
    """What runs one job after another."""

    def ask(self, request: Request, goes_on: GoesOn | None = None) -> Answer:
        """The answer to a request. Blocks its caller; ``goes_on`` as in :meth:`WorkerProcess.ask`."""

    def revive(self) -> None:
        """Wait until it is there again after its node was lost, which an answer says by ``lost``; raises where it never will be."""

    def stop(self) -> None:
        """Begin to end, and the run under way too."""

    def wait(self, seconds: float) -> bool:
        """Wait for the end, for ``seconds`` at most; whether it has come."""

    def close(self) -> None:
        """Let go of it after its end."""

    @property
    def saved(self) -> bool:
        """Whether it ended without a job, or over one whose state is saved."""


class Server(Protocol):
    """What the workers of a pool have in common."""

    def close(self) -> None:
        """Let it end after its last worker."""

    def wait(self) -> None:
        """Wait for its end."""

    def kill(self) -> None:
        """End it and all of its workers at once."""


class WorkerProcess:
    """One worker of this machine; ``ask`` blocks its caller until the answer is there."""

    def __init__(self, server: ForkServerClient, environment: Mapping[str, str]) -> None:
        self._server = server
        self._environment = dict(environment)
        self._lock = threading.Lock()
        self._over = False
        self._fork = server.fork(self._environment)

    def ask(self, request: Request, goes_on: GoesOn | None = None) -> Answer:
        """The answer; a process that dies over a job has failed it, and the next job gets a new process.

        ``goes_on`` is called with every report of a watched job, and says whether the job goes on.
        """
        fork, line = self._fork, ""
        with contextlib.suppress(OSError):  # it has gone: the empty line tells the same
            _write(fork, request)
            while (line := fork.answers.readline()).endswith("\n"):
                answer: Answer = json.loads(line)
                if "report" not in answer:
                    return answer
                _write(fork, {"go_on": goes_on is None or goes_on(answer["report"])})
        fork.ended.wait()
        with self._lock:
            if not self._over:
                fork.close()
                self._fork = self._server.fork(self._environment)
        return {"status": "FAILED", "error": f"the worker process {_how(fork.code)}", "seconds": 0.0}

    def revive(self) -> None:
        """Nothing: a process of this machine is not lost without the sweep."""

    def stop(self) -> None:
        """Have the process end, and the run under way with it; no other process takes its place."""
        with self._lock:
            self._over = True
            with contextlib.suppress(OSError):
                self._fork.channel.shutdown(socket.SHUT_WR)

    def wait(self, seconds: float) -> bool:
        """Wait for the process to end, for ``seconds`` at most; whether it did."""
        return self._fork.ended.wait(seconds)

    def close(self) -> None:
        """Let go of the process that has ended."""
        self._fork.close()

    @property
    def saved(self) -> bool:
        """Whether the process ended without a job, or over one whose state is saved, or never began."""
        return self._fork.code in (0, SAVED, -signal.SIGTERM)


def _write(fork: Fork, request: Request) -> None:
    fork.channel.sendall(json.dumps(request).encode() + b"\n")


def _how(code: int | None) -> str:
    if code is None:
        return "was lost with the one that it was forked from"
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"


Answers = queue.SimpleQueue[tuple[Worker, int | None, Answer | Exception]]
"""Of a worker and the job's index; without one, the worker is there again, or has been given up."""


class WorkerPool:
    """Workers, and what they have in common. Use as a context: leaving it ends them.

    ``saved`` tells afterwards whether every job that was under way has saved its state. ``away`` says that jobs may run on other machines;
    a job whose machine is lost begins again on another one, ``losses`` times at most.
    """

    def __init__(self, server: Server, workers: Sequence[Worker], away: bool = False, losses: int = 0) -> None:
        self._server = server
        self._workers = list(workers)
        self.away, self.losses = away, losses
        self._stopping = False
        self.saved = False

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._stopping = True
        for worker in self._workers:
            worker.stop()
        self._server.close()
        deadline = time.monotonic() + (LEAVE_S if interrupted_by_user(kind) else SAVE_S)
        try:
            ended = [worker.wait(max(0.0, deadline - time.monotonic())) for worker in self._workers]
        except KeyboardInterrupt:  # a second one
            self._server.kill()
            raise
        if not all(ended):
            self._server.kill()
        self._server.wait()
        self.saved = all(ended) and all(worker.saved for worker in self._workers)
        for worker in self._workers:
            worker.close()

    @property
    def size(self) -> int:
        """How many workers there are."""
        return len(self._workers)

    def ask(self, request: Request) -> Answer:
        """One answer from the first worker; for use before and after, not while jobs run."""
        return self._workers[0].ask(request)

    def run(self, requests: Iterable[Request | None], started: Callable[[int], None] = lambda index: None) -> Iterator[tuple[int, Answer]]:
        """Run all requests, as many at once as there are workers; yields (index, answer) as they come in.

        ``requests`` are asked for the next one when a worker is free; None says that it waits for the end of one under way, and has
        no index. Ending the iteration early drops the requests that have not begun and waits for those that have.
        """
        waiting, number = iter(requests), itertools.count()

        def take() -> Given | None:
            if (request := next(waiting, None)) is None:
                return None
            started(index := next(number))
            return index, request, None

        yield from self.feed(take)

    def feed(self, take: Callable[[], Given | None]) -> Iterator[tuple[int, Answer]]:
        """Run what ``take`` gives whenever a worker is free: (index, request, and what to do with reports); yields (index, answer).

        ``take`` gives None while there is nothing to run, and is asked again after every answer; the iteration is over once nothing runs
        and there is nothing to run. Ending it early waits for the jobs that have begun.
        """
        feeding = _Feeding(self._workers, take, self.losses)
        try:
            yield from feeding.run()
        except GeneratorExit:
            while feeding.busy and not self._stopping:
                feeding.heard()
            raise


class _Feeding:
    """Gives jobs to the workers that are free, and those of lost workers to others."""

    def __init__(self, workers: Sequence[Worker], take: Callable[[], Given | None], losses: int) -> None:
        self.take, self.losses = take, losses
        self.idle = deque(workers)
        self.busy: dict[int, Given] = {}
        self.again: deque[Given] = deque()
        self.lost: Counter[int] = Counter()  # how often, by job
        self.reviving = 0
        self.given_up: Exception | None = None  # why the last worker that will not come back does not
        self.answers: Answers = queue.SimpleQueue()

    def run(self) -> Iterator[tuple[int, Answer]]:
        """The answers as they come in.

        Raises:
            Exception: jobs are left, and every worker has been given up, the last one for this reason.
        """
        self._begin()
        while self.busy or self._left_for_revived():
            if (heard := self.heard()) is not None:
                yield heard
            self._begin()
        if self.given_up and not self.idle and (self.again or self.take() is not None):
            raise self.given_up

    def _left_for_revived(self) -> bool:
        """Whether a job is left for a worker that is coming back."""
        if self.reviving and not self.again and (given := self.take()) is not None:
            self.again.append(given)
        return bool(self.reviving and self.again)

    def _begin(self) -> None:
        while self.idle and (given := self.again.popleft() if self.again else self.take()) is not None:
            self.busy[given[0]] = given
            threading.Thread(target=_ask, args=(self.idle.popleft(), *given, self.answers), daemon=True).start()

    def heard(self) -> tuple[int, Answer] | None:
        """Wait for the next answer; None for a worker that is there again or given up, or the loss of one whose job begins again."""
        worker, index, answer = _next(self.answers)
        if index is None:
            self.reviving -= 1
            if isinstance(answer, Exception):
                self.given_up = answer
            else:
                self.idle.append(worker)
            return None
        given = self.busy.pop(index)
        if isinstance(answer, Exception):
            raise answer
        if not answer.get("lost"):
            self.idle.append(worker)
            return index, answer
        self.reviving += 1
        threading.Thread(target=_revive, args=(worker, self.answers), daemon=True).start()
        self.lost[index] += 1
        if self.lost[index] > self.losses:
            return index, answer
        self.again.append(given)
        return None


def local_pool(environments: Sequence[Mapping[str, str]]) -> WorkerPool:
    """As many worker processes of this machine as there are environments."""
    server = server_for(environments)
    return WorkerPool(server, [WorkerProcess(server, environment) for environment in environments])


def interrupted_by_user(kind: type[BaseException] | None) -> bool:
    """Whether this exception is that of Ctrl-C."""
    return kind is not None and issubclass(kind, KeyboardInterrupt) and not issubclass(kind, Terminated)


def _ask(worker: Worker, index: int, request: Request, goes_on: GoesOn | None, answers: Answers) -> None:
    """Have the worker run a job, and put its answer where the sweep waits for it; or the error of what hears its reports."""
    try:
        answers.put((worker, index, worker.ask(request, goes_on)))
    except Exception as error:
        answers.put((worker, index, error))


def _revive(worker: Worker, answers: Answers) -> None:
    try:
        worker.revive()
        answers.put((worker, None, {}))
    except Exception as error:
        answers.put((worker, None, error))


def _next(answers: Answers) -> tuple[Worker, int | None, Answer | Exception]:
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
    shared = thread_limits(threads)
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
