"""A search from its first trial to its report: ``hydra/sweeper=optuna`` in the workers of any launcher of esper's."""

from __future__ import annotations

import secrets
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import OmegaConf
from rich.console import Console

from esper.cli.launchers import LauncherConfig
from esper.compare.search.report import show, store_metrics, store_tags, write_results
from esper.compare.search.result import SearchResult, result_of
from esper.compare.search.trials import FAILED, PRUNED, Goal, Trials
from esper.compare.sweep.arms import SEED, WHOLE, Job, Layout, is_below
from esper.compare.sweep.dependencies import MissingSource, controls_to_train, derive
from esper.compare.sweep.launch import JobComposer, prepare_job
from esper.compare.sweep.mlflow_process import MlflowProcess
from esper.compare.sweep.plan_sweep import common_metric
from esper.compare.sweep.pools import pool_of, refuse_local_store
from esper.compare.sweep.progress import Progress
from esper.compare.sweep.resume import can_resume, read_note, sweep_lock, sweep_to_resume, write_note
from esper.compare.sweep.sweep import PreparedJob, Sweep, TrialJob, resume_command, save_outcome, set_aside
from esper.compare.sweep.worker import LOG
from esper.compare.sweep.worker_pool import Given, WorkerPool
from esper.config import structure
from esper.errors import Preempted, Terminated, UserError
from esper.search.config import SearchConfig
from esper.search.space import Dimension, Space, dimension, words
from esper.search.study import FILE, Proposal, Study


@dataclass
class Search(Sweep):
    """A sweep whose jobs are the trials of a study."""

    settings: SearchConfig = field(default_factory=SearchConfig)
    space: Space = field(default_factory=lambda: Space(()))

    @property
    def name(self) -> str:
        """The name of the parent run: the name of its runs, and the settings that are searched."""
        keys = [one.key.lstrip("+") for one in self.space.dimensions]
        return f"{self.jobs[0].config.name} search: {', '.join(keys[:4])}{', …' if len(keys) > 4 else ''}"


@dataclass(frozen=True)
class Words:
    """The overrides of a search: those that all trials share, the settings to choose, and the seeds of every trial."""

    fixed: tuple[str, ...]
    space: Space
    seeds: tuple[int, ...]


def read_words(overrides: Sequence[Override]) -> Words:
    """Sort the overrides of a search.

    Raises:
        UserError: nothing to search, or several values of what a search cannot choose.
    """
    fixed: list[str] = []
    found: list[Dimension] = []
    seeds: tuple[int, ...] = ()
    for override in overrides:
        key = str(override.key_or_group)
        if not override.is_sweep_override():
            fixed.append(str(override.input_line))
        elif key == SEED:
            seeds = tuple(int(text) for text in override.sweep_string_iterator())
        elif key == "task" or is_below(key, WHOLE) or override.is_hydra_override():
            raise UserError(f"{key} has several values, and a search cannot choose it: give it one value.")
        else:
            found.append(dimension(override))
    if not found:
        raise UserError(
            "Nothing to search: give a setting several values, as in 'optimizer.lr=tag(log,interval(1e-4,1e-1))' or grafting=linear,drift."
        )
    if len(set(seeds)) < len(seeds):
        raise UserError("A seed is given twice; give every seed once.")
    return Words(tuple(fixed), Space(tuple(found)), seeds)


class _Proposals:
    """Turns proposals into jobs: one a seed, numbered by trial and seed, each in its own folder."""

    def __init__(self, composer: JobComposer, given: Words, folder: Path) -> None:
        self.composer, self.given, self.folder = composer, given, folder
        self.seeds: tuple[int, ...] = given.seeds

    def jobs(self, proposal: Proposal) -> list[PreparedJob]:
        """The jobs of a trial."""
        found = []
        base = [*self.given.fixed, *words(proposal.values)]
        for at, seed in enumerate(self.seeds or (None,)):
            number = proposal.number * max(1, len(self.seeds)) + at
            overrides = base if seed is None else [*base, f"{SEED}={seed}"]
            one = prepare_job(self.composer, overrides, number, self.folder)
            arm = one.choices.get("arm", "")
            job = TrialJob(number, tuple(overrides), arm, "", one.config.seed, proposal.number, dict(proposal.values))
            found.append(replace(one, job=job))
        return found


def start(composer: JobComposer, launcher: LauncherConfig, keys: Mapping[str, Any], arguments: Sequence[str]) -> SearchResult:
    """Run the trials that are left, and report.

    Args:
        composer: of the trials' configs.
        keys: those of ``hydra.sweeper``.
        arguments: the words of the command line.

    Raises:
        UserError: a search that cannot be run as asked, before its first trial; or no trial that came to its end.
        KeyboardInterrupt: as :func:`esper.compare.sweep.run_sweep.run_sweep`.
    """
    plain = {str(key): OmegaConf.to_container(value) if OmegaConf.is_config(value) else value for key, value in keys.items()}
    settings = structure(SearchConfig, plain, "hydra.sweeper")
    typed = {text.partition("=")[0].lstrip("+~") for text in arguments}
    arguments = [*arguments, *(f"{key}={value}" for key, value in (settings.params or {}).items() if key not in typed)]
    given = read_words(OverridesParser.create(composer.loader).parse_overrides(list(arguments)))
    folder = Path(str(composer.config.hydra.sweep.dir)).resolve()
    middle = Proposal(0, {one.key: one.ends[0] for one in given.space.dimensions})
    example = _Proposals(composer, given, folder).jobs(middle)[0]
    config = example.config
    if config.resume == "auto":
        folder = sweep_to_resume(folder, sys.argv[1:], Path(config.output))
    refuse_local_store(launcher, config)
    proposals = _Proposals(composer, given, folder)
    _refuse_dependent(given.space, config.compare)
    layout = Layout((), ("",), ("",), given.seeds or (config.seed,))
    one = Search(layout, [example], folder, sys.argv[1:], Console(), launcher.retry, True, settings=settings, space=given.space)
    folder.mkdir(parents=True, exist_ok=True)
    with sweep_lock(folder):
        note = read_note(folder)
        one.id, one.parent = note.get("id") or secrets.token_hex(4), note.get("parent", "")
        most = settings.n_trials * len(layout.seeds)
        with MlflowProcess(one) as mlflow:
            workers = pool_of(launcher, most, config.trainer.device != "cpu", folder)(mlflow.environment)
            try:
                with workers:
                    return _run(one, proposals, workers, mlflow, resumed=bool(note))
            except Terminated as stop:
                if workers.saved:
                    raise Preempted(resume_command(one)) from stop
                raise


def _refuse_dependent(space: Space, compare: object) -> None:
    """Refuse arms that start with what another arm left: trials stand each for itself."""
    dependent = {*getattr(compare, "final_of", {}), *getattr(compare, "equal_macs", {})}
    for one in space.dimensions:
        if found := dependent.intersection(one.choices if one.key == "arm" else ()):
            raise UserError(
                f"arm={sorted(found)[0]} starts with what another arm left (compare.final_of, compare.equal_macs), and every trial of a "
                f"search stands alone: leave it out, as in arm={','.join(name for name in one.choices if name not in dependent)}."
            )


def _run(one: Search, proposals: _Proposals, workers: WorkerPool, mlflow: MlflowProcess, resumed: bool) -> SearchResult:
    known = workers.ask(one.jobs[0].request("describe"))
    if known.get("error"):
        raise UserError(known["error"])
    metric, direction = common_metric(one.settings.metric or one.compare.metric, [(None, "", known)])
    goal = Goal(metric, direction, tuple(one.settings.objectives))
    study = Study(one.space, one.settings, goal.directions, one.folder / FILE)
    trials = Trials(study, one.settings, goal, proposals.jobs)
    mlflow.open()
    if resumed:
        one.console.print(f"Going on with the search in {one.folder}", highlight=False, soft_wrap=True)
    _save_note(one)
    try:
        _run_trials(one, trials, workers, mlflow)
    except KeyboardInterrupt:
        mlflow.status = "KILLED"
        one.console.print(f"Stopped; what is done is kept. Go on with:\n  {resume_command(one)}", soft_wrap=True)
        raise
    fixed = [text for text in proposals.given.fixed if not text.startswith(("hydra.", "hydra/"))]
    result = result_of(study, goal, fixed)
    mlflow.files = write_results(result, one.folder, one.compare.figures)
    mlflow.metrics, mlflow.tags = store_metrics(result), store_tags(result)
    show(result, one.console)
    mlflow.status = "FINISHED"
    _save_note(one, ended=True)
    if not result.finished:
        raise UserError(f"No trial came to its end, so there is no best one; the logs of the trials in {one.folder} say why.")
    return result


def _save_note(one: Search, ended: bool = False) -> None:
    write_note(one.folder, {"id": one.id, "parent": one.parent, "name": one.name, "command": one.command, "ended": ended})


def _run_trials(one: Search, trials: Trials, workers: WorkerPool, mlflow: MlflowProcess) -> None:
    seeds = len(one.layout.seeds)
    rows = [Job(number, (), "", "", 0) for number in range(one.settings.n_trials * seeds)]
    with Progress({"trials": rows}, one.console) as progress:
        for frozen in trials.study.trials:
            if frozen.state.is_finished():
                for at in range(seeds):
                    progress.kept(rows[frozen.number * seeds + at], "kept")
        runner = _TrialRunner(one, trials, mlflow, progress, workers.away)
        for number, answer in workers.feed(runner.take):
            runner.ended(number, answer)


class _TrialRunner:
    """Gives the workers their jobs, and hears how they end. Jobs that are ``away``, on other machines, report nothing while they train."""

    def __init__(self, one: Search, trials: Trials, mlflow: MlflowProcess, progress: Progress, away: bool) -> None:
        self.search, self.trials, self.mlflow, self.progress, self.away = one, trials, mlflow, progress, away
        self._running: dict[int, PreparedJob] = {}

    def take(self) -> Given | None:
        """The next job for a worker; those whose run ended before the search was killed are only counted."""
        while (job := self.trials.next()) is not None:
            try:
                job = derive(job, lambda arm, block, seed: {})
            except MissingSource as missing:  # an arm that is no choice, but fixed
                raise UserError(f"arm={job.job.arm} cannot be searched: {missing}.") from missing
            self._running[job.job.number] = job
            if job.summary.get("status") == "FINISHED":
                self.ended(job.job.number, {"status": "FINISHED", "error": "", "seconds": 0.0})
                continue
            if not can_resume(job.config, job.folder):
                set_aside(job.folder)
            self.mlflow.add(job)
            self.progress.started(job.job)
            request = job.request("run") | {"controls": controls_to_train(job, ())}
            if self.away:
                return job.job.number, request | {"store": self.mlflow.opening(job)}, None
            request["watched"] = True
            return job.job.number, request, lambda report, job=job: self.trials.goes_on(job, report)
        return None

    def ended(self, number: int, answer: Mapping[str, object]) -> None:
        """A job has ended: its trial may be over with it."""
        job, search = self._running.pop(number), self.search
        status, error = str(answer["status"]), str(answer["error"])
        save_outcome(job, answer)
        if error:
            search.failures.append(job)
            self.mlflow.failed(job, error)
        state = self.trials.ended(job, status, job.summary)
        if state == FAILED and not error:
            error = "its metric is no number"
        seconds = answer["seconds"]
        assert isinstance(seconds, float)
        self.progress.finished(job.job, seconds, error, str(job.folder / LOG), pruned=state == PRUNED)
