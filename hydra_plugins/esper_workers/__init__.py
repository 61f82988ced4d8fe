"""Hydra's door to ``esper.compare``: plugins must live here. Imported at every start, so it stays light."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hydra._internal.core_plugins import basic_sweeper
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from esper.cli.launchers import LAUNCHERS


class BasicSweeper(basic_sweeper.BasicSweeper):
    """``hydra/sweeper=once``: Hydra's own, without composing every job only to see whether it can be composed."""

    def validate_batch_is_legal(self, batch: Sequence[Sequence[str]]) -> None:
        """Nothing: ``esper.cli.compose.check_jobs`` has looked at every value, and the launcher composes the jobs."""


class OptunaSweeper(Sweeper):
    """``hydra/sweeper=optuna``: the jobs are trials that Optuna proposes as it learns, in the workers of one of esper's launchers.

    The arguments are the fields of ``esper.search.config.SearchConfig``.
    """

    def __init__(self, **settings: Any) -> None:
        self.settings = settings

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Prepare to compose the trials."""
        from hydra.core.plugins import Plugins

        launcher = Plugins.instance().instantiate_launcher(hydra_context=hydra_context, task_function=task_function, config=config)
        assert isinstance(launcher, SweepLauncher)  # esper.cli.compose has seen to it
        self.launcher = launcher

    def sweep(self, arguments: list[str]) -> Any:
        """Run the trials and report."""
        from esper.compare.search.search import start

        return start(self.launcher.composer, self.launcher.settings, self.settings, arguments)


class SweepLauncher(Launcher):
    """The jobs of a sweep in workers, compared at the end; subclasses say where. The arguments are the keys in ``esper.cli.launchers``."""

    name: str

    def __init__(self, **settings: Any) -> None:
        from esper.config import structure

        self.settings = structure(LAUNCHERS[self.name][1], settings, "hydra.launcher")

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Prepare to compose the jobs; the task function is not used, because the workers run the jobs themselves."""
        from esper.compare.sweep.launch import JobComposer

        self.composer = JobComposer(hydra_context, config)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run the jobs and judge the arms."""
        from esper.compare.sweep.launch import launch

        return launch(self.composer, self.settings, job_overrides, initial_job_idx)


class LocalLauncher(SweepLauncher):
    """``hydra/launcher=local``: in processes of this machine."""

    name = "local"


class RayLauncher(SweepLauncher):
    """``hydra/launcher=ray``: on the nodes of a Ray cluster."""

    name = "ray"


class SubmititLauncher(SweepLauncher):
    """``hydra/launcher=submitit``: as jobs of a Slurm cluster."""

    name = "submitit"
