"""Episodes of a whole run: a trainer, the real `esper control` and the real `esper track`, each in a process of its own.

Whatever becomes of them and of the server, what the tracker wrote and which commands were applied at which tick must be
what a run in one process, with its controller and its tracker inside and nothing happening to it, says and does.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, ClassVar

import msgspec
from chaos import RUN, SETTINGS, Episode, write
from faults import wait_until
from scripted_trainer import COLUMNS, ScriptedTrainer

from esper.bus import open_bus
from esper.bus.config import MemoryConfig, RedisConfig
from esper.bus.discovery import invitation, invite
from esper.bus.trainer.bus_port import BusPort
from esper.controllers import ControllerRunner
from esper.controllers.random import RandomConfig
from esper.messages import GateResult, RunEnded, Transition
from esper.tracking import CsvConfig, RunInfo, TrackerRunner, build_trackers

TOTAL = 4000  # ticks announced; an episode ends when its faults have happened
CHECKPOINT = 20
PACE_S = 0.01
CONTROLLER = {"name": "random", "count": 2500, "earliest": "0%", "latest": "100%", "embargo": "5step"}
TRACKING = {"name": "csv", "figures": False}
TABLES = ("transitions", "seeds", "metrics")
COMPARED = tuple(kind.__name__ for kind in (Transition, GateResult, RunEnded))


def record(folder: Path, seed: int) -> RunInfo:
    """What the run is, for those who join it."""
    outside = {"process": "external"}
    config = {"seed": seed, "controller": CONTROLLER | outside, "grafting": {"name": "linear"}, "tracking": TRACKING | outside}
    place = {"folder": str(folder), "outputs": str(folder)}
    return RunInfo(run=RUN, name=RUN, started_ms=1_700_000_000_000, config=config, **place)


def train(folder: Path) -> None:
    """Train until told to stop (a file) and on to the next checkpoint; killed, it goes on from its last one."""
    bus = open_bus(RedisConfig(**invitation(folder).bus), folder)
    trainer = ScriptedTrainer(BusPort(bus, RUN, COLUMNS, external=True, deadline_s=60), TOTAL, PACE_S)
    kept = folder / "checkpoint"
    if kept.exists():
        trainer.load_state(json.loads(kept.read_text()))
    trainer.start()
    while not ((folder / "stop").exists() and trainer.tick % CHECKPOINT == 0):
        trainer.step()
        if trainer.tick % CHECKPOINT == 0:
            state = trainer.state()
            trainer.port.barrier(0.2)
            write(kept, json.dumps(state))
    trainer.end()
    write(folder / "ended", json.dumps({"tick": trainer.tick, "applied": trainer.applied, "bus": trainer.port.counts()}))
    bus.close()


def undisturbed(folder: Path, seed: int, ticks: int) -> list[list[Any]]:
    """The same run in this process, on a bus in memory; what was applied."""
    bus = open_bus(MemoryConfig(), folder)
    runner = ControllerRunner(bus.local, RUN, RandomConfig(**CONTROLLER).build(seed))
    trackers = TrackerRunner(bus.local, record(folder, seed), build_trackers(CsvConfig(**TRACKING)))
    trackers.start()
    trainer = ScriptedTrainer(BusPort(bus, RUN, COLUMNS, runner=runner), TOTAL)
    trainer.start()
    while trainer.tick < ticks:
        trainer.step()
    trainer.end()
    trackers.close("FINISHED")
    bus.close()
    return [list(entry) for entry in trainer.applied]


def story(folder: Path) -> dict[str, list[Any]]:
    """What the tracker left in a folder, without what speaks of the bus itself and of starts."""
    import pyarrow.parquet as pq

    found: dict[str, list[Any]] = {name: pq.read_table(folder / f"{name}.parquet").to_pylist() for name in TABLES}
    found["metrics.csv"] = (folder / "metrics.csv").read_text().splitlines()
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    found["events.jsonl"] = [event for event in events if event["kind"] in COMPARED]
    return found


class RunEpisode(Episode):
    """The same story and the same commands as undisturbed."""

    NAMES = ("trainer", "control", "track")
    FAULTS: ClassVar[dict[str, int]] = Episode.SERVER | {
        "kill trainer": 3,
        "kill controller": 4,
        "kill tracker": 3,
        "slow trainer": 1,
        "slow controller": 2,
        "slow tracker": 2,
    }
    STREAMS = ("events", "telemetry", "commands", "acks")

    def prepare(self) -> None:
        """Leave the note by which the others find the run."""
        config = RedisConfig(url=self.url, claim_s=2.0, **SETTINGS)
        invite(self.folder, RUN, config, msgspec.to_builtins(record(self.folder, self.outcome.seed)))

    def command(self, name: str) -> list[str]:
        """The programs as a user starts them; the trainer is this file."""
        program = [__file__] if name == "trainer" else ["-m", "esper", name]
        return [sys.executable, *program, str(self.folder)]

    def settle(self) -> None:
        """Compare."""
        for name in self.NAMES:
            if not wait_until(lambda part=self.parts[name]: part.poll() is not None, 90):
                self.outcome.wrong.append(f"{name} did not finish")
        self.outcome.wrong += [f"{name} ended with {part.returncode}" for name, part in self.parts.items() if part.returncode]
        if not self.outcome.wrong:
            self.compare()

    def compare(self) -> None:
        """With what nothing happened to."""
        ended = json.loads((self.folder / "ended").read_text())
        calm = self.folder / "calm"
        applied = undisturbed(calm, self.outcome.seed, ended["tick"])
        if applied != ended["applied"]:
            self.outcome.wrong.append(f"{len(applied)} commands were due and {len(ended['applied'])} applied, or not the same")
        expected, found = story(calm), story(self.folder)
        self.outcome.wrong += [
            f"{name}: {len(found[name])} rows, of {len(expected[name])} undisturbed, or not the same"
            for name in expected
            if found[name] != expected[name]
        ]
        rows = sum(map(len, expected.values()))
        self.outcome.counts.update(ticks=ended["tick"], commands=len(applied), rows=rows, dropped=ended["bus"]["dropped"])

    def _kill_trainer(self) -> None:
        self.again("trainer")
        self._perhaps_recover()

    def _kill_controller(self) -> None:
        self.again("control")
        self._perhaps_recover()

    def _perhaps_recover(self) -> None:
        """The next fault comes while it starts, or only once the run goes on: that takes seconds, and faults are to hit both."""
        before = self.checkpoint()
        if self.random.random() < 0.5:
            self.progress(before, 60)

    def _kill_tracker(self) -> None:
        self.again("track")

    def _slow_trainer(self) -> None:
        self.pause("trainer")

    def _slow_controller(self) -> None:
        self.pause("control")

    def _slow_tracker(self) -> None:
        self.pause("track")


if __name__ == "__main__":
    train(Path(sys.argv[1]))
