"""``hydra/launcher=ray``: the workers of a sweep on the nodes of a Ray cluster, an actor each."""

from __future__ import annotations

import logging
import signal
import socket
import threading
from collections.abc import Mapping
from typing import Any

from esper.cli.launchers import RayConfig
from esper.compare.sweep.forks import thread_limits
from esper.compare.sweep.node import LOST, Node, environment
from esper.compare.sweep.worker_pool import Answer, GoesOn, Request, WorkerPool
from esper.errors import UserError

ANSWER_S = 5.0  # how long a cluster may take to answer


class RayWorker:
    """One worker of the cluster. After the loss of its node it waits until the cluster has room for another."""

    def __init__(self, config: RayConfig, variables: Mapping[str, str]) -> None:
        self.config, self.variables = config, dict(variables)
        self._lock = threading.Lock()
        self._over = False
        self._end: Any = None
        self.saved = False
        self._start()

    def _start(self) -> None:
        import ray

        needs = {"num_cpus": self.config.cpus, "num_gpus": self.config.gpus}
        actor: Any = ray.remote(Node)
        self._actor = actor.options(**needs, max_concurrency=2, scheduling_strategy="SPREAD").remote(self.variables)
        self._ready = self._actor.ready.remote()

    def ask(self, request: Request, goes_on: GoesOn | None = None) -> Answer:
        """The answer; ``lost`` is in it where the node was lost over the job."""
        import ray

        assert goes_on is None, "a search runs on one machine"
        try:
            answer: Answer = ray.get(self._actor.ask.remote(request))
        except ray.exceptions.RayActorError:
            return {"status": "FAILED", "error": LOST, "seconds": 0.0, "lost": True}
        return answer

    def revive(self) -> None:
        """Wait for a place on a node that lives."""
        import ray

        while True:
            with self._lock:
                if self._over:
                    return
                self._start()
            try:
                ray.get(self._ready)
                return
            except ray.exceptions.RayActorError:  # that node is lost too
                continue

    def stop(self) -> None:
        """Have the worker end, and the run under way with it."""
        import ray

        with self._lock:
            self._over = True
            if ray.wait([self._ready], timeout=0)[0]:
                self._end = self._actor.end.remote()
            else:  # it has found no place yet
                ray.kill(self._actor)
                self.saved = True

    def wait(self, seconds: float) -> bool:
        """Wait for the end, for ``seconds`` at most; whether it has come."""
        import ray

        if self._end is None:
            return True
        ready, _ = ray.wait([self._end], timeout=max(seconds, 0.001))
        if ready:
            try:
                self.saved = bool(ray.get(self._end))
            except ray.exceptions.RayActorError:
                self.saved = False
            ray.kill(self._actor)
        return bool(ready)

    def close(self) -> None:
        """Nothing is left."""


class RayConnection:
    """This process's connection to the cluster; the actors of a sweep end with it."""

    def __init__(self, ours: bool) -> None:
        self.ours = ours  # whether the sweep has made it

    def close(self) -> None:
        """Nothing: the workers end one by one."""

    def wait(self) -> None:
        """Close the connection: the pool has waited for every worker."""
        if self.ours:
            self.kill()

    def kill(self) -> None:
        """End all actors of this sweep at once."""
        import ray

        ray.shutdown()


def ray_pool(config: RayConfig, most: int) -> WorkerPool:
    """As many workers as asked for or as fit into the cluster, ``most`` at most.

    Raises:
        UserError: no Ray, no cluster, or none in which a single worker fits.
    """
    connection = RayConnection(_connect(config))
    import ray

    resources: Any = ray.cluster_resources
    free = resources()
    room = [int(free.get(name, 0.0) / each) for name, each in (("CPU", config.cpus), ("GPU", config.gpus)) if each]
    fits = min(room) if room else most
    if not fits:
        connection.wait()
        raise UserError(
            f"No node of the Ray cluster has room for a worker of {config.cpus:g} CPUs and {config.gpus:g} GPUs: the cluster has "
            f"{free.get('CPU', 0.0):g} and {free.get('GPU', 0.0):g}; set hydra.launcher.cpus and hydra.launcher.gpus."
        )
    shared = environment(thread_limits(config.threads))
    workers = [RayWorker(config, shared) for _ in range(min(config.workers or fits, fits, most))]
    return WorkerPool(connection, workers, away=True, losses=config.lost)


def _connect(config: RayConfig) -> bool:
    """Connect to the cluster; False where this process was connected before."""
    try:
        import ray
    except ModuleNotFoundError as error:
        raise UserError("hydra/launcher=ray needs Ray: pip install 'esper-grow[ray]'.") from error
    if ray.is_initialized():
        return False
    before = signal.getsignal(signal.SIGTERM)
    try:
        _knock(config.address)
        ray.init(address=config.address, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"No Ray cluster answers at hydra.launcher.address={config.address}; start one (ray start --head), "
            "or scripts/cluster up to try it on this machine."
        ) from error
    finally:
        signal.signal(signal.SIGTERM, before)  # Ray sets its own, and a sweep saves its jobs
    return True


def _knock(address: str) -> None:
    """Raise OSError where nothing listens at ``address``, which Ray would try to reach for minutes; ValueError for no address."""
    if address == "auto":
        return
    host, _, number = address.rpartition(":")
    socket.create_connection((host, int(number)), ANSWER_S).close()
