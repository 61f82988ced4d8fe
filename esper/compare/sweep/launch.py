"""From the jobs of Hydra's sweeper to a sweep: compose every job, sort them into arms, run and judge them."""

from __future__ import annotations

import copy
import hashlib
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf, open_dict
from rich.console import Console

from esper.cli import conf
from esper.cli.compose import from_hydra
from esper.cli.launchers import LauncherConfig
from esper.compare.sweep.arms import Job, Layout, lay_out, refuse_own_seed, refuse_repeated, refuse_unknown_blocks
from esper.compare.sweep.pools import pool_of, refuse_local_store
from esper.compare.sweep.resume import sweep_to_resume
from esper.compare.sweep.run_sweep import run_sweep
from esper.compare.sweep.sweep import PreparedJob, Sweep, resume_command
from esper.config import conf_folder, plain
from esper.errors import UserError
from esper.tracking.run_info import flatten


class JobComposer:
    """Composes the configs of a sweep's jobs with Hydra's loader.

    A composition takes a tenth of a second and a sweep may have a thousand jobs, so jobs that differ in their seed alone share one.
    """

    def __init__(self, context: HydraContext, config: DictConfig) -> None:
        self.config = config
        self.loader = context.config_loader
        self._composed: dict[tuple[str, ...], DictConfig] = {}
        _prefer_sweep_options(self.loader)

    def compose(self, overrides: Sequence[str], number: int) -> DictConfig:
        """The tree of job ``number``, ``hydra`` included."""
        seeds = [text.removeprefix("seed=") for text in overrides if text.startswith("seed=")]
        rest = tuple(text for text in overrides if not text.startswith("seed="))
        shared = len(seeds) == 1 and seeds[0].isdecimal() and "override_dirname" not in self._subdir()
        if shared and rest in self._composed:
            config = copy.deepcopy(self._composed[rest])
        else:
            config = self.loader.load_sweep_config(self.config, list(overrides))
            if shared:
                self._composed[rest] = copy.deepcopy(config)
        with open_dict(config):
            config.hydra.job.id = config.hydra.job.num = number
            if shared:
                config.seed = int(seeds[0])
        return config

    def _subdir(self) -> str:
        """The pattern of the jobs' folders; one that spells out the overrides needs each job's own."""
        sweep = OmegaConf.to_container(self.config.hydra.sweep, resolve=False)
        assert isinstance(sweep, dict)
        return str(sweep["subdir"])


def _prefer_sweep_options(loader: Any) -> None:
    """Let Hydra's loader find the options for runs of a sweep before those of single runs with the same name.

    They are defaults like these: settings of the user, in a file or on the command line, have the last word.
    """
    conf.register_for_sweeps()
    path = loader.get_search_path()
    path.prepend("sweep", f"file://{conf_folder() / 'sweep'}")
    loader.repository.initialize_sources(path)


def launch(composer: JobComposer, launcher: LauncherConfig, job_overrides: Sequence[Sequence[str]], first: int) -> list[JobReturn]:
    """Run one batch of a sweeper; the basic sweeper's only batch is compared.

    Args:
        composer: of the jobs' configs.
        launcher: where the workers are and how many, and whether failed jobs run again.
        job_overrides: the words of each job; ``first`` is the number of the first one.

    Raises:
        UserError: the sweep cannot be judged as asked, before its first run starts.
        SystemExit: with code 1, after everything has run and was judged, when jobs failed.
    """
    began, whole = time.monotonic(), _is_whole(composer.config)
    overrides = [tuple(str(text) for text in one) for one in job_overrides]
    folder = Path(str(composer.config.hydra.sweep.dir)).resolve()
    prepared = [prepare_job(composer, one, first + number, folder) for number, one in enumerate(overrides)]
    config = prepared[0].config
    if config.resume == "auto" and (before := sweep_to_resume(folder, sys.argv[1:], Path(config.output))) != folder:
        folder = before
        prepared = [prepare_job(composer, one, first + number, folder) for number, one in enumerate(overrides)]
    refuse_local_store(launcher, config)
    refuse_unknown_blocks(config.compare.block, _settings(prepared))
    layout = lay_out(overrides, config.compare.block, config.seed)
    if whole:
        refuse_repeated(layout)
        for job, one in zip(layout.jobs, prepared, strict=True):
            refuse_own_seed(job, one.config.seed)
    else:  # another sweeper proposes as it learns: nothing is paired
        layout = Layout(tuple(Job(job.number, job.overrides, "", "", job.seed) for job in layout.jobs), ("",), ("",), layout.seeds)
    jobs = [PreparedJob(job, one.config, one.choices, one.folder) for job, one in zip(layout.jobs, prepared, strict=True)]
    if len({one.folder for one in jobs}) < len(jobs):
        raise UserError("hydra.sweep.subdir gives two jobs one folder; let it hold ${hydra.job.num}.")
    sweep = Sweep(layout, jobs, folder, sys.argv[1:], Console(), launcher.retry, not whole, launcher.minutes, began)
    gpu = any(one.config.trainer.device != "cpu" for one in jobs)
    try:
        run_sweep(sweep, pool_of(launcher, len(jobs), gpu, folder))
    except UserError as error:
        if not sweep.failures:
            raise
        print(f"esper: {error}", file=sys.stderr)
    if sweep.failures:
        retry = f"{resume_command(sweep)} hydra.launcher.retry=true"
        count = "1 job" if len(sweep.failures) == 1 else f"{len(sweep.failures)} jobs"
        sweep.console.print(f"{count} failed; to try again:\n  {retry}", soft_wrap=True, highlight=False)
        if whole:
            raise SystemExit(1)
    return [_returned(one) for one in jobs]


def _settings(jobs: Sequence[PreparedJob]) -> set[str]:
    """The dotted keys of all configurations; jobs that differ in their seed alone have the same."""
    unlike = {tuple(text for text in one.job.overrides if not text.startswith("seed=")): one.config for one in jobs}
    return {key for config in unlike.values() for key in flatten(plain(config))}


def prepare_job(composer: JobComposer, overrides: Sequence[str], number: int, sweep: Path) -> PreparedJob:
    """The job's checked config, and its folder below the sweep's."""
    config = composer.compose(overrides, number)
    HydraConfig.instance().set_config(config)
    choices = {key: str(value) for key, value in config.hydra.runtime.choices.items() if value is not None}
    unique = hashlib.sha256(str(sweep).encode()).hexdigest()[:6]  # the folder's name is the run's name on the bus
    folder = sweep / f"{config.hydra.sweep.subdir}-{unique}"
    checked = from_hydra(config, choices)
    return PreparedJob(Job(number, tuple(overrides), "", "", checked.seed), checked, choices, folder)


def _is_whole(config: DictConfig) -> bool:
    """Whether the sweeper hands over all jobs at once.

    Raises:
        UserError: Hydra's own sweeper is told to hand them over in pieces, of which none could be compared with another.
    """
    sweeper = OmegaConf.to_container(config.hydra.sweeper)
    assert isinstance(sweeper, dict)
    basic, size = str(sweeper["_target_"]).endswith(".BasicSweeper"), sweeper.get("max_batch_size")
    if basic and size is not None:
        raise UserError(
            f"hydra.sweeper.max_batch_size={size} cuts the sweep into pieces that cannot be compared; leave it out: "
            "hydra.launcher.workers says how many jobs run at once."
        )
    return basic


def _returned(one: PreparedJob) -> JobReturn:
    """The value that a sweeper learns from: the primary validation metric, NaN where a job has none."""
    summary = one.summary
    value = ((summary.get("metrics") or {}).get("final") or {}).get(summary.get("primary", ""))
    returned = JobReturn(overrides=one.job.overrides, status=JobStatus.COMPLETED)
    returned.return_value = math.nan if value is None else value
    return returned
