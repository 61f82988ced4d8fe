"""``esper control <run folder>``: a controller in its own process, which may be killed and restarted."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import msgspec

from esper.bus.codec import decode_body, encode_body
from esper.bus.discovery import joined
from esper.bus.protocol import Delivery, RemoteBus, counts_in_words, parse_id
from esper.controllers.base import Controller, decision
from esper.controllers.learned_grafting import keep_all, with_learned_grafting
from esper.controllers.runner import Contained
from esper.errors import UserError
from esper.messages import CONTROLLER, Checkpoint, Message, Proposal, RunEnded, RunStarted, TickEnded

HEARD = ("acks", "telemetry")  # beside the events; read when a tick has ended
SEND_S = 10.0


class SavedState(msgspec.Struct):
    """The memory of a controller process, from which it continues after a kill as if nothing had happened.

    ``started`` is the run's RunStarted, which a controller hears again after ``load_state``, as in a resumed run.
    ``heard`` is the last message of every stream and producer that ``state`` has seen; ``said`` are the commands of
    the last decision, which are sent again because it is not known whether they arrived: the trainer knows their ids.
    """

    tick: int = -1
    state: dict[str, Any] = {}
    heard: dict[str, str] = {}
    said: list[bytes] = []
    started: bytes = b""


class ExternalRunner:
    """Gives a controller the messages of a run and answers every tick; its state is on disk before a command leaves."""

    def __init__(self, bus: RemoteBus, run: str, controller: Controller, folder: Path, group: str = "") -> None:
        """With a ``group`` it is the local controller of that group, whose wishes go to the allocator as proposals."""
        self._controller, self._folder, self._group = controller, folder, group
        folder.mkdir(parents=True, exist_ok=True)
        reader = f"{CONTROLLER} {group}" if group else CONTROLLER
        self._consumers = {stream: bus.consumer(stream, run, reader, "external") for stream in ("events", *HEARD)}
        self._producer = bus.producer("proposals", run, group) if group else bus.producer("commands", run, CONTROLLER)
        self._handled: dict[str, list[Delivery]] = {stream: [] for stream in self._consumers}
        self._initial = controller.state()
        self._saved = SavedState(state=self._initial)
        if (folder / "now.json").exists():
            self._saved = self._load("now.json")
            self._restore()
            self._say([decode_body(command) for command in self._saved.said])

    def serve(self, idle_s: float | None = None) -> str | None:
        """Answer until the run ends and is not resumed; its status, or None after ``idle_s`` seconds without a word."""
        silent, status = 0.0, None
        while idle_s is None or silent < idle_s:
            deliveries = self._consumers["events"].read(block_s=0.5)
            if status is not None and not deliveries:
                return status
            silent = 0.0 if deliveries else silent + 0.5
            for delivery in deliveries:
                self._hear("events", delivery)
                message = delivery.message
                if isinstance(message, TickEnded):
                    self._tick(message)
                elif isinstance(message, RunEnded):
                    self._acknowledge()
                    status = message.status
                elif isinstance(message, RunStarted):
                    status = None
        return None

    def _tick(self, ended: TickEnded) -> None:
        for stream in HEARD:
            consumer = self._consumers[stream]
            # All messages of the tick are on the server by now; only a bus that answers can say that there are no more.
            while (deliveries := consumer.read(1000, 0.0 if consumer.answered else 0.05)) or not consumer.answered:
                for delivery in deliveries:
                    self._hear(stream, delivery)
        if ended.tick > self._saved.tick:
            commands = list(self._controller.decide(ended.tick))
            said: list[Message] = [*commands, decision(ended)]
            if self._group:
                said = [Proposal(group=self._group, tick=ended.tick, commands=commands)]
            self._saved.tick, self._saved.state = ended.tick, self._controller.state()
            self._saved.said = [encode_body(message) for message in said]
            self._save("now.json")
            self._say(said)
        self._acknowledge()

    def _hear(self, stream: str, delivery: Delivery) -> None:
        """Observe a message that was not observed before, in this life of the process or an earlier one."""
        self._handled[stream].append(delivery)
        name = f"{stream}/{delivery.producer}"
        if parse_id(delivery.id) <= parse_id(self._saved.heard.get(name, "0-0")):
            return
        self._saved.heard[name] = delivery.id
        if isinstance(delivery.message, RunStarted):
            if self._saved.tick >= 0 or delivery.message.tick > 0:
                self._rewind(delivery.message.tick)
            self._saved.started = encode_body(_without_stages(delivery.message))
        self._controller.observe(delivery.message)
        if isinstance(delivery.message, Checkpoint):
            self._keep(delivery.message)

    def _keep(self, checkpoint: Checkpoint) -> None:
        """Save our state where the trainer's was taken; a later Checkpoint says that the trainer's is on its disk."""
        name = f"tick-{checkpoint.tick}.json"
        if not checkpoint.path or (checkpoint.tick == self._saved.tick and not (self._folder / name).exists()):
            self._saved.state = self._controller.state()
            self._save(name)

    def _rewind(self, tick: int) -> None:
        """The trainer continues from its checkpoint of ``tick``, and so does the controller."""
        heard = self._saved.heard
        name = f"tick-{tick}.json"
        if (self._folder / name).exists():
            self._saved = self._load(name)
        elif tick == 0:
            self._saved = SavedState(state=self._initial)
        else:
            raise UserError(
                f"the run goes on from tick {tick}, but this controller kept nothing at that tick: resume from a"
                " checkpoint that was taken while it was listening"
            )
        self._saved.heard = heard
        self._controller.load_state(self._saved.state)

    def _restore(self) -> None:
        self._controller.load_state(self._saved.state)
        if self._saved.started:
            self._controller.observe(decode_body(self._saved.started))

    def _say(self, messages: list[Any]) -> None:
        for message in messages[:-1]:
            self._producer.publish(message)
        for message in messages[-1:]:
            self._producer.send(message, SEND_S)

    def _acknowledge(self) -> None:
        for stream, consumer in self._consumers.items():
            consumer.ack(self._handled[stream])
            self._handled[stream] = []

    def _save(self, name: str) -> None:
        partial = self._folder / f"{name}.partial"
        partial.write_bytes(msgspec.json.encode(self._saved))
        partial.replace(self._folder / name)

    def _load(self, name: str) -> SavedState:
        return msgspec.json.decode((self._folder / name).read_bytes(), type=SavedState)

    @property
    def tick(self) -> int:
        """The last tick that was decided on."""
        return self._saved.tick

    def close(self) -> None:
        """Release the streams; messages that were not acknowledged come again."""
        self._producer.close()
        for consumer in self._consumers.values():
            consumer.close()


def _without_stages(started: RunStarted) -> RunStarted:
    """The event without stages: those of the start are older than those in a controller's state."""
    sites = [{key: value for key, value in site.items() if key != "stages"} for site in started.sites]
    return replace(started, sites=sites)


def main(argv: Sequence[str]) -> int:
    """Control the run in a folder until it ends; 0 when it finished, 1 when it failed or was killed."""
    parser = argparse.ArgumentParser(prog="esper control", description=__doc__)
    parser.add_argument("folder", type=Path, help="output folder of a run with controller.process=external, or with controller.remote")
    parser.add_argument("--group", default="", help="be the local controller of this group of sites, one of controller.remote")
    options = parser.parse_args(list(argv))
    from esper.config import options as options_of

    folder = options.folder.resolve()
    with joined(folder, "controller", options.group) as (bus, found):
        settings, seed = found.info["config"]["controller"], found.info["config"]["seed"]
        kind = options_of("controller")[settings["name"]]
        names = {field.name for field in fields(kind)}
        config = kind(**{key: value for key, value in settings.items() if key in names})
        controller = _local(config, options.group, seed) if options.group else _whole(config, found.info["config"]["grafting"], seed)
        place = folder / "bus" / ("controller " + quote(options.group, safe="") if options.group else "controller")
        runner = ExternalRunner(bus, found.run, Contained(controller), place, options.group)
        what = f"the group '{options.group}' of {found.run}" if options.group else found.run
        print(f"controlling {what} with controller={settings['name']}", file=sys.stderr, flush=True)
        try:
            status = runner.serve()
            if status == "FINISHED":
                keep_all(controller, str(settings.get("memory", "")), folder, runner.tick)
        finally:
            runner.close()
        print(f"the run ended: {status}; {counts_in_words(bus.counts())}", file=sys.stderr)
    return 0 if status == "FINISHED" else 1


def _whole(config: Any, grafting: dict[str, Any], seed: int) -> Controller:
    """The run's controller, which chooses grafting strategies too where the run asks for that."""
    from esper.grafting.config import CONFIGS

    kind = CONFIGS.get(grafting["name"])
    return config.build(seed) if kind is None else with_learned_grafting(config.build(seed), kind(**grafting), seed)


def _local(config: Any, group: str, seed: int) -> Controller:
    """The local controller of a group. Raises UserError where the run has none elsewhere by that name."""
    from esper.controllers.groups import RemoteLocal

    remote = list(getattr(config, "remote", ()))
    if group not in remote:
        there = f"it names {', '.join(remote)}" if remote else "it names none"
        raise UserError(f"--group {group} is none of the run's controller.remote: {there}.")
    return RemoteLocal(config.local_controller(group, seed), group, config.groups)
