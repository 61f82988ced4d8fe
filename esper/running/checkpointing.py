"""The checkpoints of a run: when they are due, and one on SIGTERM."""

from __future__ import annotations

import json
import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from esper import messages
from esper.bus.trainer.bus_port import ControllerSilent
from esper.checkpoint import disk
from esper.checkpoint.background_saver import Retention, Saver
from esper.checkpoint.disk import Checkpoint, Copy
from esper.checkpoint.shards import take_out, write
from esper.errors import Preempted, RankLost
from esper.lifecycle.duration import parse
from esper.running.connections import Connections, Setup
from esper.running.provenance import provenance
from esper.trainer.trainer import Trainer

log = logging.getLogger(__name__)

SETTLING_S = 120.0
SKIPPED = (
    "the checkpoint due at step %d is skipped, and so is every other that comes due while the one before is still being written; "
    "a longer trainer.checkpoint_every leaves none out"
)


class Checkpointer:
    """Called between two steps of a session that begins after step ``since`` (−1: at the start).

    The port and the controller are saved with the trainer. A checkpoint counts once the trackers have stored all messages before it. Of a
    host that processes share out, each of them writes its part, and the training waits for it: ``write_part``.
    """

    def __init__(self, setup: Setup, links: Connections, since: int) -> None:
        settings, folder = setup.config.trainer, setup.folder
        self.every: str = settings.checkpoint_every
        self.folder, self.port, self.controller, self.trackers = folder, links.port, links.controller, links.trackers
        self.port.safe.hold = bool(self.every)
        retention = Retention(settings.checkpoint_keep, settings.checkpoint_best, settings.checkpoint_hours)
        self.saver = Saver(folder / disk.FOLDER, retention, self._settled, self._written)
        self._due = False
        self._finished: list[Checkpoint] = []
        disk.sweep_out(folder / disk.FOLDER)
        disk.forget_after(folder / disk.FOLDER, since)

    def __call__(self, trainer: Trainer) -> None:
        """Save a checkpoint that is due. Raises Preempted after SIGTERM, ControllerSilent after a missed deadline, once saved."""
        while self._finished:
            done = self._finished.pop(0)
            self.port.emit(messages.Checkpoint(tick=trainer.grow.tick_number, path=str(done.path), digest=done.manifest["sha256"]))
        steps, silent = trainer.outcome.steps, self.port.silent
        over, stops = steps == trainer.total, trainer.grow.agreement.stops
        due = silent is not None or self._falls_due(trainer, over or stops)
        if trainer.ranks.sharded:
            disk.discard(self._shards)
            trainer.ranks.decided(beside(steps), lambda: [str(self._shards) if due else "", bool(silent or (due and stops))])
        if silent is not None:
            self._stop(trainer, silent)
        if not due:
            return
        if not self.saver.save(lambda: self._copy(trainer), wait=over or stops or trainer.ranks.sharded) and self.saver.skipped == 1:
            log.info(SKIPPED, steps)
        if stops:
            raise Preempted(f"esper resume={self.folder}")

    def _falls_due(self, trainer: Trainer, ends: bool) -> bool:
        """Whether a checkpoint is to be saved after this step; the run ``ends`` with it, or goes on."""
        if not self.every:
            return False
        steps, grow = trainer.outcome.steps, trainer.grow
        interval = max(1, parse(self.every).ticks(trainer.total, trainer.steps_per_epoch))
        self._due = self._due or steps % interval == 0 or ends
        if not self._due or not (steps == trainer.total or grow.steps % grow.settings.steps_per_tick == 0):
            return False  # a resumed run would publish the first messages of a tick again
        self._due = False
        return True

    @property
    def _shards(self) -> Path:
        """Where the processes write their parts of a checkpoint until it is whole."""
        return self.folder / disk.FOLDER / ".shards"

    def _stop(self, trainer: Trainer, silent: ControllerSilent) -> NoReturn:
        """The controller in another process missed its deadline: save a checkpoint for a resumed run, then stop."""
        self.saver.save(lambda: self._copy(trainer), wait=True)
        raise ControllerSilent(f"{silent}: esper resume={self.folder} and esper control {self.folder}.") from silent

    def _copy(self, trainer: Trainer) -> Copy:
        self.controller.hear()
        if self.port.external:
            self.port.emit(
                messages.Checkpoint(tick=trainer.grow.tick_number, path="", digest="")
            )  # for the controller to keep its own state here
        state: dict[str, Any] = {
            "trainer": trainer.state(),
            "controller": json.dumps(self.controller.state()),
            "port": json.dumps(self.port.state()),
            "alerts": json.dumps(self.port.alerts),
            **provenance(trainer.task, trainer.device),
        }
        sites = state["trainer"]["grow"]["topology"]
        place = None
        if trainer.ranks.sharded:
            state, shards = take_out(state)
            place = self._shards
            write(shards, place, trainer.ranks.group)
        return disk.copy(state, trainer.outcome.steps, trainer.grow.tick_number, sites, _score(trainer), place)

    def _settled(self) -> bool:
        self.port.barrier()
        kept = bool(self.trackers.settle(SETTLING_S))
        if not kept:
            log.warning("a checkpoint does not count, for what was said before it is not kept: the trackers failed or took too long")
        return kept

    def _written(self, checkpoint: Checkpoint) -> None:
        self._finished.append(checkpoint)


def beside(steps: int) -> str:
    """The label under which rank 0 says what follows after a step."""
    return f"what follows after step {steps}"


def write_part(trainer: Trainer, folder: str) -> None:
    """Write this process's part of a checkpoint that rank 0 saves."""
    write(take_out({"trainer": trainer.state()})[1], Path(folder), trainer.ranks.group)


@contextmanager
def listening(trainer: Trainer) -> Iterator[None]:
    """Context in which the first SIGTERM waits for the end of the step, where a checkpoint is saved; a second one has its usual effect.

    In several processes all of them stop after the same step.
    """
    if not trainer.config.checkpoint_every:
        yield
        return
    before = signal.getsignal(signal.SIGTERM)

    def ask(signum: int, frame: object) -> None:
        trainer.grow.agreement.asked = True
        signal.signal(signal.SIGTERM, before)

    try:
        signal.signal(signal.SIGTERM, ask)
    except ValueError:  # not the main thread, which alone may handle signals
        yield
        return
    after: Any = before
    try:
        yield
    except RankLost:
        after = signal.SIG_IGN  # torchrun's, to the ranks that are left: this one ends already, and is to say why
        raise
    finally:
        signal.signal(signal.SIGTERM, after)


def _score(trainer: Trainer) -> float | None:
    """The last validation value of the primary metric, negated if smaller is better; None if there is none or it is not a number."""
    name = f"validation/{trainer.task.primary}"
    value = next((value for _, key, value in reversed(trainer.outcome.history) if key == name), None)
    if value is None or value != value:
        return None
    return value if trainer.task.metrics[trainer.task.primary].direction == "max" else -value
