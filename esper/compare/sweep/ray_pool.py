"""``hydra/launcher=ray``: the workers of a sweep on the nodes of a Ray cluster, an actor each."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import socket
import threading
from collections.abc import Iterator, Mapping
from typing import Any

from esper.cli.launchers import RayConfig
from esper.compare.sweep.forks import thread_limits
from esper.compare.sweep.node import LOST, Node, environment
from esper.compare.sweep.worker_pool import Answer, GoesOn, Request, WorkerPool
from esper.errors import UserError
from esper.extras import import_extra

ANSWER_S = 5.0  # how long a cluster may take to answer
TRIES = "RAY_gcs_server_port_wait_time_s"  # how often ray.init asks the cluster who it is; each time takes a second or more


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

        assert goes_on is None, "a job elsewhere reports nothing while it trains"
        try:
            answer: Answer = ray.get(self._actor.ask.remote(request))
        except ray.exceptions.RayActorError as error:
            return {"status": "FAILED", "error": _reason(error), "seconds": 0.0, "lost": True}
        return answer

    def revive(self) -> None:
        """Wait for a place on a node that lives.

        Raises:
            UserError: no node could start it, as often in a row as a job may be lost.
        """
        import ray

        reason = ""
        for _ in range(1 + self.config.lost):
            with self._lock:
                if self._over:
                    return
                self._start()
            try:
                ray.get(self._ready)
                return
            except ray.exceptions.RayActorError as error:  # that node is lost too, or cannot run esper
                reason = _reason(error)
        with self._lock:
            self._ready = None
        raise UserError(f"A worker of the Ray cluster did not come up in {1 + self.config.lost} tries: {reason}.")

    def stop(self) -> None:
        """Have the worker end, and the run under way with it."""
        import ray

        with self._lock:
            self._over = True
            if self._ready is None:  # it was given up, and its job with it or to another
                self.saved = True
            elif ray.wait([self._ready], timeout=0)[0]:
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

    known: Any = ray.nodes  # which has no annotations
    nodes = [node["Resources"] for node in known() if node["Alive"]]
    fits = sum(room(node, config) for node in nodes) if config.cpus or config.gpus else most
    if not fits:
        connection.wait()
        sizes = sorted({(node.get("CPU", 0.0), node.get("GPU", 0.0)) for node in nodes} - {(0.0, 0.0)}, reverse=True)[:3]
        raise UserError(
            f"No node of the Ray cluster has room for a worker of {_size(config.cpus, config.gpus)}: its largest have "
            f"{', '.join(_size(*each) for each in sizes) or 'none of either'}; set hydra.launcher.cpus and hydra.launcher.gpus."
        )
    shared = environment(thread_limits(config.threads))
    workers = [RayWorker(config, shared) for _ in range(min(config.workers or fits, fits, most))]
    return WorkerPool(connection, workers, away=True, losses=config.lost)


def room(node: Mapping[str, float], config: RayConfig) -> int:
    """How many workers fit on a node with these resources: a worker is on one node, and a share of a GPU on one GPU."""
    free = []
    if config.cpus:
        free.append(_times(node.get("CPU", 0.0), config.cpus))
    if config.gpus >= 1.0:
        free.append(_times(node.get("GPU", 0.0), config.gpus))
    elif config.gpus:
        free.append(int(node.get("GPU", 0.0)) * _times(1.0, config.gpus))
    return min(free)


def _times(whole: float, part: float) -> int:
    return math.floor(whole / part + 1e-6)  # 0.3 has three parts of 0.1


def _size(cpus: float, gpus: float) -> str:
    return f"{cpus:g} CPUs and {gpus:g} GPUs"


def _reason(error: Exception) -> str:
    """Why a worker is not there: its node was lost, or could not start it, for which Ray's last line has the reason."""
    if not getattr(error, "actor_init_failed", False):
        return LOST
    return f"a node could not start its worker ({str(error).strip().splitlines()[-1]}); what is installed here must be there too"


def _connect(config: RayConfig) -> bool:
    """Connect to the cluster; False where this process was connected before."""
    ray = import_extra("ray", "hydra/launcher=ray", "esper-grow[ray]")
    if ray.is_initialized():
        return False
    if config.address.startswith("ray://"):
        raise UserError(
            f"hydra.launcher.address={config.address} is that of Ray Client: give the one that its nodes know, as in 10.0.0.1:6379, "
            "and start the sweep on one of them."
        )
    before = signal.getsignal(signal.SIGTERM)
    try:
        _knock(config.address)
        with _few_tries():
            ray.init(address=config.address, log_to_driver=False, logging_level=logging.ERROR)
    except (ray.exceptions.RayError, OSError, ValueError, RuntimeError) as error:
        raise UserError(_refusal(config.address, error)) from error
    finally:
        signal.signal(signal.SIGTERM, before)  # Ray sets its own, and a sweep saves its jobs
    return True


def _knock(address: str) -> None:
    """Raise OSError where nothing listens at ``address``, which Ray would try to reach for minutes; ValueError for no address."""
    if address == "auto":
        return
    host, _, number = address.rpartition(":")
    socket.create_connection((host, int(number)), ANSWER_S).close()


@contextlib.contextmanager
def _few_tries() -> Iterator[None]:
    """Within, Ray asks the cluster twice who it is, unless the environment says how often, and not twenty times."""
    asked = os.environ.get(TRIES)
    os.environ.setdefault(TRIES, "2")
    try:
        yield
    finally:
        if asked is None:
            os.environ.pop(TRIES, None)


def _refusal(address: str, error: BaseException) -> str:
    """Why there is no connection, and what to do."""
    where, said = f"hydra.launcher.address={address}", []
    cause: BaseException | None = error
    while cause is not None:
        said.append(str(cause))
        cause = cause.__cause__ or cause.__context__
    text = " ".join(" ".join(said).split())
    if "AuthToken" in text or "RAY_AUTH_" in text:
        return (
            f"The Ray cluster at {where} asks for its token and was given none, or another one: set RAY_AUTH_MODE=token and "
            "RAY_AUTH_TOKEN_PATH (scripts/cluster status prints both for the cluster that it has started)."
        )
    if (at := text.find("Version mismatch")) >= 0:
        return f"The Ray cluster at {where} was started with other versions; install the same here ({text[at:][:300]})."
    return f"No Ray cluster answers at {where}; start one (ray start --head), or scripts/cluster up to try it on this machine."
