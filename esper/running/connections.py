"""A run's bus with its port, controller and trackers: in this process, or reached over the bus where they have their own process."""

from __future__ import annotations

import json
import logging
import shlex
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch

from esper.bus import open_bus
from esper.bus.config import EmbeddedConfig, ServerConfig
from esper.bus.discovery import invite
from esper.bus.programs.tracker import GROUP as TRACKER
from esper.bus.protocol import Bus
from esper.bus.server.payloads import RELEASED, keep_all, released
from esper.bus.trainer.bus_port import BusPort, ControllerSilent
from esper.checkpoint.tree import fitting
from esper.config import RootConfig
from esper.controllers import ControllerRunner
from esper.distributed import Ranks
from esper.errors import UserError
from esper.messages import CONTROLLER, Alert, Message
from esper.running.builders import build_controller, describe_run
from esper.running.controller_memory import recall
from esper.running.run_folder import FolderLock
from esper.tasks.base import Task
from esper.telemetry_columns import COLUMNS
from esper.tracking import RunInfo, Tracker, TrackerRunner, mlflow_in, prepared_trackers, trackers_in
from esper.tracking.mlflow_store import check_store
from esper.tracking.progress_bar import ProgressBar
from esper.tracking.tracker_thread import STREAMS as READ_BY_TRACKERS
from esper.trainer.trainer import Trainer
from esper.user_code import CustomTracker

log = logging.getLogger(__name__)

EXTERNAL = "external"
CONTROLLER_S, TRACKER_S = 5.0, 60.0  # how long the end of a run waits for parts in other processes


@dataclass(frozen=True)
class Setup:
    """A requested run: settings, folder, task, device, and the checkpoint's state that it continues from, if any.

    ``controls`` are the control runs that it makes, ``ranks`` the processes that share the training; ``watch`` is called after every look
    at the validation set; ``test`` says whether the test set is measured at the end.
    """

    config: RootConfig
    folder: Path
    lock: FolderLock
    task: Task
    device: torch.device
    state: Any
    controls: Collection[str]
    quiet: bool
    ranks: Ranks
    watch: Callable[[Trainer], None] | None = None
    test: bool = True


@dataclass(frozen=True)
class Connections:
    """A run's bus and everything that is connected to it in this process."""

    info: RunInfo
    bus: Bus
    port: RunPort
    controller: ControllerRunner | ExternalController
    trackers: TrackerRunner
    progress: TrackerRunner


class RunPort(BusPort):
    """The trainer's port, remembering the alerts for the summary and, until the step is whole, that the controller is silent."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.alerts: list[dict[str, Any]] = []
        self.silent: ControllerSilent | None = None

    def emit(self, event: Message) -> None:
        """Publish an event, and remember it if it is an alert."""
        if isinstance(event, Alert):
            self.alerts.append(asdict(event))
        super().emit(event)

    def end_tick(self, tick: int) -> None:
        """End the tick like the bus's port, but leave ControllerSilent to the ``Checkpointer``, which can save first."""
        try:
            super().end_tick(tick)
        except ControllerSilent as error:
            self.silent = error


class ExternalController:
    """Placeholder for a controller in another process, which saves its own state."""

    def hear(self) -> None:
        """Nothing to read here."""

    def state(self) -> None:
        """Nothing for the trainer's checkpoint."""

    def load_state(self, state: None) -> None:
        """There is no state to load."""

    def close(self) -> None:
        """Nothing was opened."""


class ExternalTrackers:
    """Placeholder for trackers in another process; knows only whether they want the final model in the run's folder."""

    called = "storing the final model"

    def __init__(self, wants_model: bool) -> None:
        self.wants_model = wants_model

    def open(self, info: RunInfo) -> None:
        """Nothing to prepare."""

    def record(self, messages: Sequence[Message]) -> None:
        """Another process reads them."""

    def flush(self) -> None:
        """The bus keeps the messages."""

    def close(self, status: str, summary: Mapping[str, Any]) -> None:
        """Nothing was opened."""


def refuse_unreachable(config: RootConfig) -> None:
    """Raise UserError for a part in another process on a bus that no other process can reach."""
    if remote_groups(config) and (config.controller.process == EXTERNAL or not isinstance(config.bus, ServerConfig)):
        raise UserError(
            "controller.remote needs the allocator in this process and a bus that other processes can reach: choose"
            " controller.process=internal, and bus=embedded or bus=redis."
        )
    for group in ("controller", "tracking"):
        if getattr(config, group).process == EXTERNAL and not isinstance(config.bus, ServerConfig):
            raise UserError(
                f"{group}.process=external needs a bus that another process can reach, and bus={config.bus.name} lives in this one:"
                " add bus=embedded or bus=redis."
            )


def remote_groups(config: RootConfig) -> list[str]:
    """Groups of sites whose local controller is a process of its own."""
    return list(getattr(config.controller, "remote", ()))


def refuse_untrackable(config: RootConfig, folder: Path) -> None:
    """Raise UserError for a run made longer whose first part `esper track` can no longer read."""
    if config.tracking.process == EXTERNAL and released(folder / "bus" / "payloads"):
        raise UserError(RELEASED.format(run=f"in {folder}"))


def say_where(config: RootConfig, bus: Bus, info: RunInfo, folder: Path, quiet: bool) -> None:
    """Announce the run's bus to other processes, and tell the user which programs to start."""
    if isinstance(config.bus, ServerConfig):
        invite(folder, info.run, config.bus, msgspec.to_builtins(info))
        if config.tracking.process == EXTERNAL:
            keep_all(folder / "bus" / "payloads")
    for group, program in (("controller", "control"), ("tracking", "track")):
        if getattr(config, group).process == EXTERNAL and not quiet:
            print(f"{group}.process=external: start  esper {program} {folder}", file=sys.stderr, flush=True)
    for name in [] if quiet else remote_groups(config):
        print(f"controller.remote: start  esper control {folder} --group {shlex.quote(name)}", file=sys.stderr, flush=True)


def connect(setup: Setup, trackers: Sequence[Tracker]) -> Connections:
    """Open the run's bus and connect its parts to it. Raises UserError for settings that no controller can be built from."""
    config, folder = setup.config, setup.folder
    settings, controller = config.controller, build_controller(config, setup.task)  # where it decides elsewhere, refused here all the same
    if setup.state is None:
        recall(config, controller)
    info = describe_run(config, setup.task, folder, round(time.time() * 1000))
    bus = open_bus(config.bus, folder)
    say_where(config, bus, info, folder, setup.quiet)
    runner: ControllerRunner | ExternalController
    if settings.process == EXTERNAL:
        runner = ExternalController()
        port = RunPort(bus, info.run, COLUMNS, None, settings.timing, external=True, deadline_s=settings.deadline_s)
    else:
        beyond = bus if remote_groups(config) else None
        runner = ControllerRunner(bus.local, info.run, controller, debug=config.trainer.debug, beyond=beyond)
        port = RunPort(bus, info.run, COLUMNS, runner, settings.timing)
    progress = TrackerRunner(bus.local, info, [] if setup.quiet else [ProgressBar()], group="progress")
    return Connections(info, bus, port, runner, TrackerRunner(bus.local, info, trackers), progress)


def _wants_model(settings: Any) -> bool:
    own = isinstance(settings, CustomTracker)
    return bool(settings.build().wants_model if own else getattr(settings, "model", False))


@contextmanager
def trackers_of(config: RootConfig, folder: Path) -> Iterator[list[Tracker]]:
    """The run's trackers. Raises UserError for a store that cannot be there; MLflow is tried while the run is prepared."""
    if config.tracking.process == EXTERNAL:
        yield [ExternalTrackers(any(map(_wants_model, trackers_in(config.tracking))))]
        return
    if mlflow := mlflow_in(config.tracking):
        check_store(mlflow, config.output)
    with prepared_trackers(config.tracking, folder, Path(config.output)) as trackers:
        yield trackers


def let_them_read(config: RootConfig, bus: Bus, run: str, port: RunPort, quiet: bool) -> bool:
    """Let parts in other processes read the last messages, before the run's own server ends with it.

    Returns whether the trackers have; those of a server that stays may have more time.
    """
    if not isinstance(config.bus, EmbeddedConfig):
        return bool(config.tracking.process != EXTERNAL)
    tracked = True
    waited_for = {"controller": 0.0 if port.silent else CONTROLLER_S, "tracking": TRACKER_S}
    began = time.monotonic()
    for group, prefix, streams in (("controller", CONTROLLER, ("events",)), ("tracking", TRACKER, READ_BY_TRACKERS)):
        if getattr(config, group).process != EXTERNAL and not (group == "controller" and remote_groups(config)):
            continue
        while not (read := _has_read(bus, run, prefix, streams)) and time.monotonic() - began < waited_for[group]:
            time.sleep(0.05)
        tracked = read if group == "tracking" else tracked
        if not read and group == "tracking" and not quiet:
            print(f"tracking.process=external: nobody read the end of {run}, and its server ends with it", file=sys.stderr, flush=True)
    return tracked


def let_payloads_go(bus: Bus, run: str, port: RunPort, tracked: bool) -> None:
    """Remove the large messages of a finished run that was ``tracked``; where it was not, `esper track` does this at its end.

    Messages that have not reached the server yet stay for the next start, and their payloads with them.
    """
    if bus.local is bus:  # in memory: most runs end without the half second that the client of a server takes to load
        return
    import redis

    from esper.bus.server.bus import ServerBus

    if not isinstance(bus, ServerBus) or not (port.finished and tracked) or bus.counts()["waiting"]:
        return
    try:
        bus.payloads(run).release()
    except redis.RedisError as error:
        log.warning("the large messages of %s stay in %s, since the bus server does not answer: %s", run, bus.folder / "payloads", error)


def _has_read(bus: Bus, run: str, prefix: str, names: Sequence[str]) -> bool:
    """Whether the group exists and has acknowledged everything on these streams; True if the server does not answer."""
    import redis

    from esper.bus.server.bus import ServerBus
    from esper.bus.server.status import status

    assert isinstance(bus, ServerBus)
    try:
        streams = [stream for stream in status(bus, run).streams if stream.stream in names]
    except redis.RedisError:
        return True
    groups = [group for stream in streams for group in stream.groups if group.name.startswith(prefix)]
    return bool(groups) and not any(group.pending or group.behind for group in groups)


def load_state(state: Mapping[str, str], controller: ControllerRunner | ExternalController, port: RunPort) -> None:
    """Load a checkpoint's state. Raises UserError if the controller's state was saved in another process than it runs in now."""
    with fitting():
        memory = json.loads(state["controller"])
        if (memory is None) != isinstance(controller, ExternalController):
            before, now = (EXTERNAL, "internal") if memory is None else ("internal", EXTERNAL)
            raise UserError(
                f"This checkpoint was taken with controller.process={before}, so a controller with process={now} would go on"
                f" without its memory: go on with controller.process={before}."
            )
        controller.load_state(memory)
        port.load_state(json.loads(state["port"]))
        port.alerts = list(json.loads(state["alerts"]))
