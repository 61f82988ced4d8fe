"""One run: device, task, host, bus, controller, trackers, training, controls, summary, report."""

from __future__ import annotations

import errno
import logging
import sys
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from esper.bus import open_bus
from esper.bus.trainer.bus_port import ControllerSilent
from esper.checkpoint import store
from esper.config import RootConfig, plain
from esper.export.saved_model import FOLDER as MODEL
from esper.export.saved_model import host_card, save_model
from esper.messages import Alert
from esper.report.end_of_run import print_report
from esper.report.progress import ProgressBar
from esper.report.summary_file import ControlSummary, Summary, reserve, write_summary
from esper.running.builders import build_trainer, refuse_idle
from esper.running.checkpointing import Keeper
from esper.running.connections import (
    Watched,
    connect_controller,
    let_payloads_go,
    let_them_read,
    load,
    refuse_alone,
    refuse_untrackable,
    say_where,
    trackers_of,
)
from esper.running.control_keys import SAME_MACS, SAME_STEPS, controls_of
from esper.running.controls import control, equal_macs_steps, one_step, trained_host
from esper.running.environment import environment
from esper.running.environments import note_life
from esper.running.model_selection import put_in_place, replaces, say_so
from esper.running.naming import run_record
from esper.running.profiling import profiled
from esper.running.provenance import other_versions, refuse_other_data
from esper.running.run_folder import Life, alive, refuse_occupied, status
from esper.running.summarize import summarize
from esper.running.weight_trace import Traced
from esper.tasks.base import Task
from esper.tracking import MlflowConfig, Tracker, TrackerError, TrackerRunner, tracking_uri, ui_command
from esper.trainer.device import choose_device, describe, keep_freed_memory, numerics
from esper.trainer.trainer import Trainer

log = logging.getLogger(__name__)

#: The errors of a file that can grow no further.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

#: What ends a run that can go on where it was stopped.
STOPPED = (KeyboardInterrupt, ControllerSilent)


@dataclass
class Result:
    """What a run leaves: its summary, and the primary validation metric that a sweeper optimizes."""

    summary: Summary
    primary: float


def run(config: RootConfig, folder: Path, quiet: bool = False, state: Any = None, controls: Collection[str] | None = None) -> Result:
    """Train as ``config`` says, everything written under ``folder``; ``state`` is that of a checkpoint to go on from.

    ``controls`` are those that are trained too: what a sweep's report shows, or (None) all that the run has.

    Ctrl-C and SIGTERM end the run as KILLED, an error as FAILED; what was learnt so far is kept, and the exception goes on.
    Raises UserError for what the user can mend.
    """
    refuse_alone(config)
    folder = folder.resolve()
    if state is None and (status(folder) == "FINISHED" or store.checkpoints(folder / store.FOLDER)):
        refuse_occupied(folder)
    refuse_untrackable(config, folder)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with trackers_of(config, folder) as trackers:
            device = choose_device(config.trainer)
            keep_freed_memory()
            if not quiet:
                print(describe(device, config.trainer), file=sys.stderr, flush=True)
            task = config.task.build()
            if state is not None:
                refuse_other_data(state, task, folder)
            with numerics(config.trainer), alive(config, folder) as life:
                wanted = controls_of(config) if controls is None else controls
                return _connected(config, task, device, folder, quiet, state, trackers, life, wanted)
    except KeyboardInterrupt as stop:
        stop.args = stop.args or (str(folder),)  # for the sentence that says where what was kept lies
        raise
    except OSError as error:
        if error.errno in FULL and error.filename is None:  # a write that failed does not say where
            error.filename = str(folder)
        raise


def _connected(
    config: RootConfig,
    task: Task,
    device: Any,
    folder: Path,
    quiet: bool,
    state: Any,
    who: list[Tracker],
    life: Life,
    controls: Collection[str],
) -> Result:
    info = run_record(config, task, folder, round(time.time() * 1000))
    bus = open_bus(config.bus, folder)
    say_where(config, bus, info, folder, quiet)
    runner, port = connect_controller(config, task, bus, info)
    trackers = TrackerRunner(bus.local, info, who)
    progress = TrackerRunner(bus.local, info, [] if quiet else [ProgressBar()], group="progress")
    lost: TrackerError | None = None
    ending = _Ending()
    try:
        with _failing(progress, trackers):
            if state is not None:
                load(state, runner, port)
            trainer = build_trainer(config, task, device, port, state=None if state is None else state["trainer"])
            with _beginning(trainer):
                refuse_idle(config, task, trainer)
                trackers.try_model(trainer.grow.export(), _inputs(trainer))
                reserve(folder)
                trackers.start()  # only now: what is refused leaves no run behind
                trackers.await_open()
                note_life(folder, 0 if state is None else trainer.outcome.steps, environment(device))
                life.begin()
            since = -1 if state is None else trainer.outcome.steps
            traced, keeper = Traced(folder, since), Keeper(config, folder, port, runner, trackers, since)
            progress.start()
            if state is not None and (warning := other_versions(state, device)):
                log.warning(warning)
                port.emit(Alert(tick=trainer.grow.tick_number, level="warning", code="other_versions", text=warning))
        with _ending(ending, config, trainer, port, folder, info.run, trackers, progress, life):
            with keeper.listening(), profiled(trainer, _both(life, traced, keeper), config.trainer.profile, folder) as between:
                log.info("step %d of %d comes next", trainer.outcome.steps + 1, trainer.total)
                trainer.fit(between)
            keeper.saver.wait()
            progress.close("FINISHED", grace_s=0.0)  # the run's end is published later: waiting for it would cost each run a second
            ending.summary = summarize(config, trainer, folder, info.run, "FINISHED", port.alerts)
            host = _controls(config, trainer, ending.summary, quiet, controls) if controls else None
            if config.trainer.save:
                _save(config, trainer, host, folder / MODEL)
            trackers.log_model(trainer.grow.export() if host is None else host, _inputs(trainer))
            if host is not None:
                say_so(ending.summary, port)
    except TrackerError as error:  # the training itself is done: its report first
        lost = error
    finally:
        try:
            tracked = let_them_read(config, bus, info.run, port, quiet)
            let_payloads_go(bus, info.run, port, tracked)
            runner.close()
            bus.close()
            _count_unsent(ending.summary, port, folder)
        except Exception:
            ending.failed(folder)
            raise
    assert ending.summary is not None
    if not quiet:
        command = ui_command(tracking_uri(config.tracking, config.output)) if isinstance(config.tracking, MlflowConfig) else ""
        print_report(ending.summary, "" if lost else command)
    if lost is not None:
        raise lost
    return Result(ending.summary, ending.summary["metrics"]["final"][ending.summary["primary"]])


@dataclass
class _Ending:
    summary: Summary | None = None

    def failed(self, folder: Path) -> None:
        """Something failed after the summary was written, which must not say FINISHED then."""
        if self.summary is not None and self.summary["status"] == "FINISHED":
            self.summary["status"] = "FAILED"
            write_summary(self.summary, folder)


@contextmanager
def _ending(
    ending: _Ending,
    config: RootConfig,
    trainer: Trainer,
    port: Watched,
    folder: Path,
    run: str,
    trackers: TrackerRunner,
    progress: TrackerRunner,
    life: Life,
) -> Iterator[None]:
    """However the training ends, its summary is written and said, and the trackers are closed with the right status."""
    status, interrupted = "FINISHED", True
    try:
        yield
        interrupted = False
    except STOPPED:
        status = "KILLED"
        raise
    except BaseException:
        status = "FAILED"
        raise
    finally:
        if status == "FINISHED" and trackers.error is not None:  # the model's program, say: the trackers shall know how it ended
            status = "FAILED"
        if ending.summary is None or interrupted:
            ending.summary = summarize(config, trainer, folder, run, status, port.alerts)
        ending.summary["status"] = status
        ending.summary["bus"] = port.counts()
        try:
            life.refuse_removed()
            write_summary(ending.summary, folder)
            life.end()
        except OSError:  # a full disk, say: the trackers are told all the same
            status = ending.summary["status"] = "FAILED" if status == "FINISHED" else status
            raise
        finally:
            trainer.grow.close(status, dict(ending.summary))
            try:
                with _quietly(interrupted):
                    progress.close(status)
                    trackers.close(status)
            except TrackerError:
                ending.failed(folder)
                raise


def _count_unsent(summary: Summary | None, port: Watched, folder: Path) -> None:
    """What a server that does not answer was not given is known when the bus is closed, which is after the summary was written."""
    counts = port.counts()
    if summary is not None and counts.get("waiting"):
        summary["bus"] = counts
        write_summary(summary, folder)


@contextmanager
def _beginning(trainer: Trainer) -> Iterator[None]:
    """A run that cannot begin though its trainer stands lets go of what that holds."""
    try:
        yield
    except BaseException:
        trainer.batches.close()
        trainer.grow.close("FAILED")
        raise


@contextmanager
def _failing(*trackers: TrackerRunner) -> Iterator[None]:
    """A run that cannot even begin, or is interrupted before, leaves no tracker open."""
    try:
        yield
    except BaseException as error:
        with _quietly(True):
            for tracker in trackers:
                tracker.close("KILLED" if isinstance(error, STOPPED) else "FAILED")
        raise


@contextmanager
def _quietly(other: bool) -> Iterator[None]:
    """A tracker's failure, which is in the log already, does not hide the ``other`` reason for which a run ends."""
    try:
        yield
    except TrackerError:
        if not other:
            raise


def _both(life: Life, traced: Traced, keeper: Keeper) -> Callable[[Trainer], None]:
    """What comes after a step: its weights are noted before anything counts on it, at every look at the validation set."""

    def after(trainer: Trainer) -> None:
        if trainer.validates(trainer.outcome.steps):
            life.refuse_removed()
        traced(trainer)
        keeper(trainer)

    return after


def _controls(config: RootConfig, trainer: Trainer, summary: Summary, quiet: bool, wanted: Collection[str]) -> nn.Module | None:
    """Put the host alone into the summary, at the same steps and at the same MACs; the one at the same steps where it is to be kept."""
    kept, better, task = Path(config.output).resolve() / "controls", config.trainer.keep == "better", trainer.task

    def alone(steps: int, why: str, weights: bool) -> dict[str, Any]:
        if not quiet:
            print(f"control: the host alone, {steps} steps ({why})", file=sys.stderr, flush=True)
        return control(config, task, trainer.device, steps, kept, weights)

    summary["control"], summary["control_curves"] = told, curves = ControlSummary(), {}
    steps = alone(trainer.total, "the same number", better) if SAME_STEPS in wanted else None
    if steps is not None:
        told["same_steps"], curves["same_steps"] = steps["metrics"], steps["curves"]
    if SAME_MACS in wanted:
        paid = one_step(config, task, trainer.device) if steps is None else steps
        macs = alone(equal_macs_steps(trainer.grow.meter.total, paid), "the same training MACs", False)
        told["same_macs"], curves["same_macs"] = macs["metrics"], macs["curves"]
    if steps is None or not better or not replaces(summary, steps):
        return None
    host = trained_host(config, task, steps, kept)
    put_in_place(host, steps, summary, trainer)
    return host


def _save(config: RootConfig, trainer: Trainer, host: nn.Module | None, folder: Path) -> None:
    """Leave the run's model: what grew, or the never-grown ``host`` in its place."""
    card = host_card(plain(config)["model"], trainer.task)
    if host is None:
        trainer.grow.save(folder, card)
    else:
        save_model(folder, host, [], card)


def _inputs(trainer: Trainer) -> Tensor:
    batch = next(trainer.validation.epoch())
    inputs: Tensor = batch[0]
    return inputs[:8]
