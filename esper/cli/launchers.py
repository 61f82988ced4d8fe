"""The launchers of sweeps and their keys, ``hydra.launcher.…``: on this machine, on a Slurm cluster, on a Ray cluster."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum

from esper.errors import UserError
from esper.setting_fields import setting

_PACKAGE = "hydra_plugins.esper_workers."
_WORD = re.compile(r"[\w.,:&|@+-]*")


class BatchSystem(StrEnum):
    """What submitit hands the jobs to."""

    slurm = "slurm"
    local = "local"


@dataclass
class LauncherConfig:
    """The jobs of a sweep, or the trials of a search, in processes of this machine."""

    workers: int = setting(0, low=0, help="processes at once; 0: one per GPU, or per core where there is no GPU")
    threads: int = setting(1, low=1, help="CPU threads of numerical libraries in each")
    retry: bool = setting(False, help="run jobs again that failed in an earlier start of the same sweep")
    minutes: float = setting(0.0, low=0.0, help="begin no pairs that would end later than so long after the sweep's start; 0: no limit")


@dataclass
class RayConfig(LauncherConfig):
    """The jobs of a sweep on the nodes of a Ray cluster, each in a worker that is reused."""

    workers: int = setting(0, low=0, help="jobs at once; 0: as many as the nodes of the cluster have CPUs (and GPUs) for")
    address: str = setting("auto", help="address of the cluster, as in 10.0.0.1:6379; auto: RAY_ADDRESS, or the one of this machine")
    cpus: float = setting(1.0, low=0.0, help="CPUs of a node that each worker takes")
    gpus: float = setting(0.0, low=0.0, help="GPUs of a node that each worker takes; 0.5: two workers share one")
    lost: int = setting(3, low=0, help="how often a job begins again elsewhere after its node was lost, before it counts as failed")

    def __post_init__(self) -> None:
        if self.gpus > 1.0 and self.gpus % 1.0:
            raise UserError(f"hydra.launcher.gpus={self.gpus:g} is not accepted: a worker has a share of one GPU (0.5), or whole ones (2).")


@dataclass
class SubmititConfig(LauncherConfig):
    """The jobs of a sweep as jobs of a Slurm cluster, sent by submitit."""

    workers: int = setting(100, low=1, help="jobs in Slurm's queue at once")
    cluster: BatchSystem = setting(BatchSystem.slurm, help="local runs the same jobs on this machine, for trying it")
    timeout_min: int = setting(240, low=1, help="time limit of a job; one that needs longer saves its state before and is queued again")
    cpus: int = setting(1, low=1, help="CPUs of each job")
    gpus: int = setting(0, low=0, help="GPUs of each job")
    memory_gb: float = setting(0.0, low=0.0, help="memory of each job; 0: Slurm's default")
    partition: str = setting("", help="Slurm's partition; empty: its default")
    account: str = setting("", help="Slurm's account; empty: its default")
    qos: str = setting("", help="Slurm's quality of service; empty: its default")
    constraint: str = setting("", help="features that a node must have, as Slurm writes them; empty: none")
    lost: int = setting(3, low=0, help="how often a job is sent again after its node was lost, before it counts as failed")

    def __post_init__(self) -> None:
        for key in ("partition", "account", "qos", "constraint"):
            if not _WORD.fullmatch(value := getattr(self, key)):  # it becomes a line of a script
                raise UserError(f"hydra.launcher.{key}={value!r} is not accepted: letters, digits and . , : & | @ + - _ alone.")


#: hydra/launcher=NAME → the class of the plugin, and its keys.
LAUNCHERS: dict[str, tuple[str, type[LauncherConfig]]] = {
    "local": (f"{_PACKAGE}LocalLauncher", LauncherConfig),
    "ray": (f"{_PACKAGE}RayLauncher", RayConfig),
    "submitit": (f"{_PACKAGE}SubmititLauncher", SubmititConfig),
}


def keys_of(target: str) -> type[LauncherConfig] | None:
    """The keys of the launcher whose class is ``target``; None for a launcher that is not esper's."""
    return next((kind for name, kind in LAUNCHERS.values() if name == target), None)


def is_local(target: str) -> bool:
    """Whether ``target`` is the launcher whose jobs are processes of this machine."""
    return target == LAUNCHERS["local"][0]
