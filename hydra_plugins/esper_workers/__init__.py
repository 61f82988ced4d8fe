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

from esper.cli.conf import LauncherConfig


class BasicSweeper(basic_sweeper.BasicSweeper):
    """``hydra/sweeper=once``: Hydra's own, without composing every job only to see whether it can be composed."""

    def validate_batch_is_legal(self, batch: Sequence[Sequence[str]]) -> None:
        """Nothing: ``esper.cli.compose.check_jobs`` has looked at every value, and the launcher composes the jobs."""


class OptunaSweeper(Sweeper):
    """``hydra/sweeper=optuna``: the jobs are trials that Optuna proposes as it learns, in the processes of ``hydra/launcher=workers``.

    The arguments are the fields of ``esper.search.config.SearchConfig``.
    """

    def __init__(self, **settings: Any) -> None:
        self.settings = settings

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Prepare to compose the trials."""
        from hydra.core.plugins import Plugins

        launcher = Plugins.instance().instantiate_launcher(hydra_context=hydra_context, task_function=task_function, config=config)
        assert isinstance(launcher, WorkersLauncher)  # esper.cli.compose has seen to it
        self.launcher = launcher

    def sweep(self, arguments: list[str]) -> Any:
        """Run the trials and report."""
        from esper.compare.search.search import start

        return start(self.launcher.composer, self.launcher.settings, self.settings, arguments)


class WorkersLauncher(Launcher):
    """``hydra/launcher=workers``: the jobs of a sweep in processes that are reused, compared at the end.

    Args:
        workers: processes at once; 0 means one per GPU, or per core where there is no GPU.
        threads: CPU threads of numerical libraries in each (torch's own are ``trainer.threads``).
        retry: run jobs again that failed in an earlier start of the same sweep.
        minutes: begin no pairs that would end later than so long after the sweep's start; 0 means that there is no limit.
    """

    def __init__(self, workers: int = 0, threads: int = 1, retry: bool = False, minutes: float = 0.0) -> None:
        self.settings = LauncherConfig(workers, threads, retry, minutes)

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Prepare to compose the jobs; the task function is not used, because the workers run the jobs themselves."""
        from esper.compare.sweep.launch import JobComposer

        self.composer = JobComposer(hydra_context, config)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run the jobs and judge the arms."""
        from esper.compare.sweep.launch import launch

        return launch(self.composer, self.settings, job_overrides, initial_job_idx)
