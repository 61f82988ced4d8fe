"""The pool of a launcher: workers of this machine, of a Ray cluster, or places in Slurm's queue."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from esper.cli.launchers import LauncherConfig, RayConfig, SubmititConfig
from esper.compare.sweep.worker_pool import WorkerPool, local_pool, worker_environments
from esper.config import RootConfig
from esper.errors import UserError
from esper.tracking.config import mlflow_in, sqlite_file, tracking_uri


def pool_of(launcher: LauncherConfig, most: int, gpu: bool, folder: Path) -> Callable[[Mapping[str, str]], WorkerPool]:
    """Starts the workers of a sweep, given environment variables for each.

    Args:
        launcher: where and how many.
        most: more than the sweep has jobs are never of use.
        gpu: whether a worker of this machine may need one.
        folder: the sweep's.
    """

    def start(variables: Mapping[str, str]) -> WorkerPool:
        if isinstance(launcher, RayConfig):
            from esper.compare.sweep.ray_pool import ray_pool

            return ray_pool(launcher, most)
        if isinstance(launcher, SubmititConfig):
            from esper.compare.sweep.submitit_pool import submitit_pool

            return submitit_pool(launcher, most, folder)
        found = worker_environments(min(launcher.workers, most), launcher.threads, gpu)[:most]
        return local_pool([{**each, **variables} for each in found])

    return start


def refuse_local_store(launcher: LauncherConfig, config: RootConfig) -> None:
    """Raise UserError where jobs on other machines would write to a file of SQLite, which takes one machine's processes alone."""
    mlflow = mlflow_in(config.tracking)
    if not isinstance(launcher, (RayConfig, SubmititConfig)) or mlflow is None:
        return
    if (file := sqlite_file(tracking_uri(mlflow, config.output))) is not None:
        raise UserError(
            f"The jobs may run on several machines, which cannot write to one file of SQLite ({file}): give the address of an MLflow "
            "server, tracking.uri=http://…, or choose tracking=csv. scripts/cluster up starts a server to try it with."
        )
