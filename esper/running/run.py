"""One run: device, task, host, bus, controller, trackers, training, controls, summary, report."""

from __future__ import annotations

import errno
import logging
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from esper.checkpoint import disk
from esper.config import RootConfig, plain
from esper.export.saved_model import FOLDER as MODEL
from esper.export.saved_model import host_card, save_model
from esper.messages import Alert
from esper.report.end_of_run import print_report
from esper.report.summary_file import ControlSummary, Summary, reserve
from esper.running.builders import build_host, build_trainer, refuse_idle
from esper.running.callbacks import Callback, WeightChecksums, profiled
from esper.running.checkpointing import Checkpointer, listening
from esper.running.connections import Connections, Setup, connect, load_state, refuse_unreachable, refuse_untrackable, trackers_of
from esper.running.control_runs import SAME_MACS, SAME_STEPS, control_run, controls_of, equal_macs_steps, one_step, trained_host
from esper.running.controller_memory import remember
from esper.running.ending import Ending
from esper.running.model_selection import announce, put_in_place, replaces
from esper.running.processes import joined, refuse_wrong_processes, tell
from esper.running.provenance import environment, note_session, other_versions, refuse_other_data
from esper.running.run_folder import hold_folder, refuse_occupied, status
from esper.tasks.table_columns import write_preprocessing
from esper.tracking import Tracker, TrackerError, mlflow_in, tracking_uri, ui_command
from esper.trainer.device import choose_device, describe, keep_freed_memory, numerics
from esper.trainer.trainer import Trainer

log = logging.getLogger(__name__)

#: The errors of a file that can grow no further.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass
class Result:
    """The result of a run: its summary, and the primary validation metric that a sweeper optimizes."""

    summary: Summary
    primary: float


def run(
    config: RootConfig,
    folder: Path,
    quiet: bool = False,
    state: Any = None,
    controls: Collection[str] | None = None,
    watch: Callback | None = None,
    test: bool = True,
) -> Result:
    """Train as ``config`` says, everything written under ``folder``; ``state`` is that of a checkpoint to continue from.

    ``controls`` are those that are trained too: those of a sweep's report, or (None) all that the run has. ``watch`` is called after
    every look at the validation set; it may end the run by raising Pruned, which is raised again. ``test``: the test set
    is measured at the end; a search that looks at it once leaves that to its last model.

    Ctrl-C and SIGTERM end the run as KILLED, an error as FAILED; the results so far are kept, and the exception is raised again.
    Raises UserError for errors that the user can mend.
    """
    refuse_unreachable(config)
    refuse_wrong_processes(config)
    folder = folder.resolve()
    if state is None and (status(folder) == "FINISHED" or disk.checkpoints(folder / disk.FOLDER)):
        refuse_occupied(folder)
    refuse_untrackable(config, folder)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with joined() as ranks, trackers_of(config, folder) as trackers:
            tell(ranks, config, state)
            device = choose_device(config.trainer)
            keep_freed_memory()
            if not quiet:
                print(describe(device, config.trainer), file=sys.stderr, flush=True)
            task = config.task.build()
            if state is not None:
                refuse_other_data(state, task, folder)
            with numerics(config.trainer), hold_folder(config, folder) as lock:
                wanted = controls_of(config) if controls is None else controls
                return _carry_out(Setup(config, folder, lock, task, device, state, wanted, quiet, ranks, watch, test), trackers)
    except KeyboardInterrupt as stop:
        stop.args = stop.args or (str(folder),)  # for the sentence that names the folder
        raise
    except OSError as error:
        if error.errno in FULL and error.filename is None:  # a write that failed does not say where
            error.filename = str(folder)
        raise


def _carry_out(setup: Setup, trackers: Sequence[Tracker]) -> Result:
    links = connect(setup, trackers)
    ending = Ending(setup, links)
    lost: TrackerError | None = None
    try:
        with ending.of_failed_start():
            trainer = _begin(setup, links)
            since = -1 if setup.state is None else trainer.outcome.steps
            checksums, checkpointer = WeightChecksums(setup.folder, since), Checkpointer(setup, links, since)
            links.progress.start()
            if setup.state is not None and (warning := other_versions(setup.state, setup.device)):
                log.warning(warning)
                links.port.emit(Alert(tick=trainer.grow.tick_number, level="warning", code="other_versions", text=warning))
        with ending.of_training(trainer):
            _train(setup, trainer, checksums, checkpointer)
            remember(setup, links, trainer.grow.tick_number)
            links.progress.close("FINISHED", grace_s=0.0)  # the run's end is published later: waiting for it would cost each run a second
            _leave_model(setup, links, trainer, ending.summarize(trainer, "FINISHED"))
    except TrackerError as error:  # the training itself is done: its report first
        lost = error
    finally:
        ending.disconnect()
    summary, config = ending.summary, setup.config
    assert summary is not None
    if not setup.quiet:
        mlflow = mlflow_in(config.tracking)
        command = ui_command(tracking_uri(mlflow, config.output)) if mlflow else ""
        print_report(summary, "" if lost else command)
    if lost is not None:
        raise lost
    return Result(summary, summary["metrics"]["final"][summary["primary"]])


def _begin(setup: Setup, links: Connections) -> Trainer:
    """Build the trainer and open the trackers, after everything that could refuse the run was checked."""
    config, folder, state = setup.config, setup.folder, setup.state
    if state is not None:
        load_state(state, links.controller, links.port)
    kept = None if state is None else state["trainer"]
    trainer = build_trainer(config, setup.task, setup.device, links.port, state=kept, ranks=setup.ranks)
    with _let_go_on_failure(trainer):
        refuse_idle(config, setup.task, trainer)
        # a sharded host is not gathered for it
        model = build_host(config, setup.task) if setup.ranks.sharded else trainer.grow.export()
        links.trackers.try_model(model, _sample(trainer))
        reserve(folder)
        links.trackers.start()  # only now: a refused run leaves no MLflow run behind
        links.trackers.await_open()
        write_preprocessing(setup.task.preprocessing, folder)
        note_session(folder, 0 if state is None else trainer.outcome.steps, environment(setup.device))
        setup.lock.begin()
    return trainer


@contextmanager
def _let_go_on_failure(trainer: Trainer) -> Iterator[None]:
    """Context that closes the trainer if the run cannot begin."""
    try:
        yield
    except BaseException:
        trainer.batches.close()
        trainer.grow.close("FAILED")
        raise


def _train(setup: Setup, trainer: Trainer, checksums: WeightChecksums, checkpointer: Checkpointer) -> None:
    """Train the remaining steps, and wait until the last checkpoint is on disk."""
    after_step = _after_step(setup, checksums, checkpointer)
    with listening(trainer), profiled(trainer, after_step, setup.config.trainer.profile, setup.folder) as callback:
        log.info("step %d of %d comes next", trainer.outcome.steps + 1, trainer.total)
        trainer.fit(callback, setup.test)
    checkpointer.saver.wait()


def _after_step(setup: Setup, checksums: WeightChecksums, checkpointer: Checkpointer) -> Callback:
    """The callback after every step: the weights' checksum is written before the checkpoint, the folder checked at every evaluation."""

    def after(trainer: Trainer) -> None:
        looked = trainer.validates(trainer.outcome.steps)
        if looked:
            setup.lock.refuse_removed()
        if not setup.ranks.sharded:  # else no process has all weights
            checksums(trainer)
        checkpointer(trainer)
        if looked and setup.watch is not None:
            setup.watch(trainer)

    return after


def _leave_model(setup: Setup, links: Connections, trainer: Trainer, summary: Summary) -> None:
    """Train the controls and leave the run's model: the grown one, or the never-grown host in its place."""
    host = _train_controls(setup, trainer, summary) if setup.controls else None
    if setup.config.trainer.save:
        card = host_card(plain(setup.config)["model"], trainer.task)
        if host is None:
            trainer.grow.save(setup.folder / MODEL, card)
        else:
            save_model(setup.folder / MODEL, host, [], card)
        write_preprocessing(trainer.task.preprocessing, setup.folder / MODEL)
    links.trackers.log_model(trainer.grow.export() if host is None else host, _sample(trainer))
    if host is not None:
        announce(summary, links.port)


def _train_controls(setup: Setup, trainer: Trainer, summary: Summary) -> nn.Module | None:
    """Put the host alone into the summary, at the same steps and at the same MACs; return the host to keep."""
    config, task, wanted = setup.config, trainer.task, setup.controls
    folder, better = Path(config.output).resolve() / "controls", config.trainer.keep == "better"

    def alone(steps: int, why: str, weights: bool) -> dict[str, Any]:
        if not setup.quiet:
            print(f"control: the host alone, {steps} steps ({why})", file=sys.stderr, flush=True)
        return control_run(config, task, trainer.device, steps, folder, weights)

    summary["control"], summary["control_curves"] = metrics, curves = ControlSummary(), {}
    steps = alone(trainer.total, "the same number", better) if SAME_STEPS in wanted else None
    if steps is not None:
        metrics["same_steps"], curves["same_steps"] = steps["metrics"], steps["curves"]
    if SAME_MACS in wanted:
        paid = one_step(config, task, trainer.device) if steps is None else steps
        macs = alone(equal_macs_steps(trainer.grow.meter.total, paid), "the same training MACs", False)
        metrics["same_macs"], curves["same_macs"] = macs["metrics"], macs["curves"]
    if steps is None or not better or not replaces(summary, steps):
        return None
    host = trained_host(config, task, steps, folder)
    put_in_place(host, steps, summary, trainer)
    return host


def _sample(trainer: Trainer) -> Tensor:
    """Eight inputs of the validation set."""
    batch = next(trainer.validation.epoch())
    inputs: Tensor = batch[0]
    return inputs[:8]
