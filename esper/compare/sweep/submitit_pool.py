"""``hydra/launcher=submitit``: every job of a sweep as a job of a Slurm cluster."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from esper.cli.launchers import BatchSystem, SubmititConfig
from esper.compare.sweep.forks import thread_limits
from esper.compare.sweep.node import LOST, Node
from esper.compare.sweep.worker_pool import Answer, GoesOn, Request, WorkerPool, local_pool
from esper.errors import UserError
from esper.extras import import_extra

FOLDER = "submitit"  # in the sweep's: scripts, logs and results
LOOK_S = 0.2  # between two looks at a job; submitit itself asks Slurm more rarely


class BatchJob:
    """What runs in a job of Slurm's. Before its time limit, or when it is preempted, it saves its state and is queued again."""

    def __init__(self, variables: Mapping[str, str]) -> None:
        self.variables = dict(variables)
        self._node: Node | None = None

    def __call__(self, request: Request) -> Answer:
        """Run the job of ``request``; SIGTERM, by which a job is cancelled, has it save its state."""
        import submitit

        _begun(submitit.JobEnvironment().paths).touch()
        node = self._node = Node(self.variables)
        answers: list[Answer] = []
        asking = threading.Thread(target=lambda: answers.append(node.ask(request)), daemon=True)
        signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=node.end, daemon=True).start())
        asking.start()
        while asking.is_alive():  # by turns, so that signals are heard
            asking.join(0.2)
        node.end()
        return answers[0] if answers else {"status": "FAILED", "error": "its worker ended unexpectedly", "seconds": 0.0}

    def checkpoint(self, request: Request) -> Any:
        """Called by submitit where the job is queued again: save the state; the same job goes on from it."""
        import submitit

        if self._node is not None and self._node.end():
            _begun(submitit.JobEnvironment().paths).unlink(missing_ok=True)  # from here on there is nothing to lose
        return submitit.helpers.DelayedSubmission(BatchJob(self.variables), request)


def _begun(paths: Any) -> Path:
    """The file that a job leaves beside submitit's own where there is something that it has not saved."""
    folder: Path = paths.folder
    return folder / f"{paths.job_id}_begun"


class BatchWorker:
    """A place in the queue: sends one job after another, and waits for each."""

    def __init__(self, config: SubmititConfig, executor: Any, variables: Mapping[str, str], lock: threading.Lock) -> None:
        self.config, self.executor, self.variables = config, executor, dict(variables)
        self._lock = lock  # of the executor
        self._over = threading.Event()
        self._idle = threading.Event()
        self._idle.set()
        self._job: Any = None
        self.saved = True

    def ask(self, request: Request, goes_on: GoesOn | None = None) -> Answer:
        """The answer; a job whose node is lost is sent again."""
        import submitit

        assert goes_on is None, "a job elsewhere reports nothing while it trains"
        request = request | {"wait_s": 60.0 * self.config.timeout_min}  # for the same job of a killed sweep, still in the queue
        self._idle.clear()
        try:
            lost = 0
            error = LOST
            while lost <= self.config.lost:
                with self._lock:
                    if self._over.is_set():
                        break
                    try:
                        self._job = self.executor.submit(BatchJob(self.variables), request)
                    except submitit.core.utils.FailedJobError as refused:
                        said = " ".join(str(refused).split())
                        return {"status": "FAILED", "error": f"Slurm did not take the job: {said}", "seconds": 0.0}
                while not (off := self._is_called_off()) and not self._job.done():
                    time.sleep(LOOK_S)
                if off:
                    break
                try:
                    answer: Answer = self._job.result()
                except (submitit.core.utils.UncompletedJobError, submitit.core.utils.FailedJobError) as failure:
                    if self._over.is_set():
                        self.saved = not _begun(self._job.paths).exists()
                        break
                    lost, error = lost + 1, f"{LOST}: {(str(failure).strip().splitlines() or [''])[-1].strip()}"
                    continue
                if (
                    answer.get("stopped") and not self._over.is_set()
                ):  # by Slurm, for a job of more importance: it goes on from what is saved
                    self._job.cancel(check=False)  # Slurm may have queued it again too
                    continue
                if answer.get("stopped"):
                    self.saved = bool(answer["saved"])
                return answer
            return {"status": "FAILED", "error": error, "seconds": 0.0}
        finally:
            self._job = None
            self._idle.set()

    def revive(self) -> None:
        """Nothing: the queue has places enough."""

    def stop(self) -> None:
        """Cancel the job under way, which saves its state."""
        with self._lock:
            job = self._job
            self._over.set()
            if job is None or job.done():
                return
            if self.config.cluster == BatchSystem.local:
                os.kill(int(job.job_id), signal.SIGTERM)  # its own way to cancel kills after a second
            else:
                job.cancel(check=False)

    def _is_called_off(self) -> bool:
        """Whether the job was cancelled before it began. It has nothing to save, and it may be minutes until submitit asks Slurm again."""
        return self._over.is_set() and self.config.cluster == BatchSystem.slurm and not _begun(self._job.paths).exists()

    def wait(self, seconds: float) -> bool:
        """Wait for the job under way to end, for ``seconds`` at most; whether it did."""
        return self._idle.wait(seconds)

    def close(self) -> None:
        """Nothing is left."""


class BatchQueue:
    """The jobs' executor, as what the workers have in common."""

    def close(self) -> None:
        """Nothing: the jobs end one by one."""

    def wait(self) -> None:
        """Nothing: the pool has waited for every job."""

    def kill(self) -> None:
        """Nothing: Slurm kills a cancelled job that does not end."""


class BatchPool(WorkerPool):
    """A pool whose questions about tasks are answered here, and not by jobs that would have to wait in the queue."""

    def ask(self, request: Request) -> Answer:
        """One answer from a process of this machine."""
        with local_pool([thread_limits(1)]) as here:
            return here.ask(request)


def submitit_pool(config: SubmititConfig, most: int, folder: Path) -> WorkerPool:
    """As many places in the queue as asked for, ``most`` at most.

    Raises:
        UserError: no submitit, or no Slurm on this machine.
    """
    executor = executor_for(config, folder)
    shared = thread_limits(config.threads)  # the rest of the environment is Slurm's to hand on: these are written to a file
    lock = threading.Lock()
    return BatchPool(BatchQueue(), [BatchWorker(config, executor, shared, lock) for _ in range(min(config.workers, most))], away=True)


def executor_for(config: SubmititConfig, folder: Path) -> Any:
    """Submitit's executor with these settings; its files go into ``folder``.

    Raises:
        UserError: no submitit, or no Slurm on this machine.
    """
    submitit = import_extra("submitit", "hydra/launcher=submitit", "esper-grow[slurm]")
    try:
        executor = submitit.AutoExecutor(folder / FOLDER, cluster=config.cluster.value)
    except RuntimeError as error:
        raise UserError(
            "hydra/launcher=submitit finds no Slurm here (no srun on the PATH); run it on a login node, or try it with "
            "hydra.launcher.cluster=local."
        ) from error
    needs: dict[str, Any] = {
        "name": "esper",
        "timeout_min": config.timeout_min,
        "cpus_per_task": config.cpus,
        "nodes": 1,
        "tasks_per_node": 1,
    }
    if config.gpus:
        needs["gpus_per_node"] = config.gpus
    if config.memory_gb:
        needs["mem_gb"] = config.memory_gb
    asked = {key: value for key in ("partition", "account", "qos", "constraint") if (value := getattr(config, key))}
    slurm = {f"slurm_{key}": value for key, value in asked.items()} | {"slurm_additional_parameters": {"requeue": True}}
    executor.update_parameters(**needs, **(slurm if config.cluster == BatchSystem.slurm else {}))
    return executor
