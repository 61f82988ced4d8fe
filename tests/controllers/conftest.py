"""A trainer's side of a run, small enough to see through: real bus, port and runner, stages by a simple table."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from esper.bus import open_bus
from esper.bus.config import MemoryConfig
from esper.bus.trainer.bus_port import BusPort
from esper.controllers import ControllerRunner
from esper.controllers.base import Controller
from esper.lifecycle.stages import Stage
from esper.messages import Acknowledgement, Cancel, Command, EmergencyStop, Germinate, Metrics, Transition

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # growing.py

COLUMNS = ("stage", "alpha", "mean", "variance", "near_zero", "correlation")


def _site(name: str, seeds: int, parameters: int) -> dict[str, Any]:
    return {
        "name": name,
        "kind": "linear",
        "width": 8 * seeds,
        "seeds": seeds,
        "blueprint": "mlp",
        "blueprints": {"mlp": {"parameters": parameters, "macs": parameters}, "affine": {"parameters": 2, "macs": 2}},
        "host_parameters": 1000,
        "telemetry_every": 1,
    }


class Run:
    """A run of 100 ticks over two sites: ``fc1`` with four seeds and ``fc2`` with two."""

    def __init__(self, bus: Any, controller: Controller, name: str = "run") -> None:
        self.sites = [_site("fc1", 4, 100), _site("fc2", 2, 300)]
        self.runner = ControllerRunner(bus.local, name, controller)
        self.acks = bus.local.consumer("acks", name, "test", "test")
        self.port = BusPort(bus, name, COLUMNS, runner=self.runner)
        self.stages = {(s["name"], i): Stage.DORMANT for s in self.sites for i in range(s["seeds"])}
        self.health: dict[tuple[str, int], tuple[float, float, float]] = dict.fromkeys(self.stages, (1.0, 0.0, 0.0))
        self.refuse: set[tuple[str, int]] = set()
        self.handed: dict[int, list[Command]] = {}
        self.tick = 0

    def start(self, tick: int = 0, total_ticks: int = 100) -> Run:
        """Say that the run begins, or goes on."""
        self.tick = tick
        self.port.started(tick, total_ticks, self.sites)
        return self

    def move(self, site: str, seed: int, target: Stage, blueprint: str = "", why: dict[str, Any] | None = None) -> None:
        """A transition, said on the bus."""
        source, self.stages[site, seed] = self.stages[site, seed], target
        said = {"cause": "test", "blueprint": blueprint, "why": why or {}}
        self.port.emit(Transition(tick=self.tick, site=site, seed=seed, branch=-1, source=source, target=target, **said))

    def until(self, last: int, metrics: Callable[[int], dict[str, float]] | None = None) -> Run:
        """Train up to tick ``last``: apply commands, say telemetry and metrics, end the tick."""
        while self.tick < last:
            self.tick += 1
            for command in self.port.commands(self.tick):
                self._apply(command)
            for site in self.sites:
                rows = np.zeros((site["seeds"], len(COLUMNS)), dtype=np.float32)
                for seed in range(site["seeds"]):
                    rows[seed, 3:] = self.health[site["name"], seed]
                self.port.telemetry(self.tick, site["name"], torch.from_numpy(rows))
            if metrics is not None:
                self.port.emit(Metrics(tick=self.tick, values=metrics(self.tick)))
            self.port.end_tick(self.tick)
        return self

    def _apply(self, command: Command) -> None:
        self.handed.setdefault(self.tick, []).append(command)
        reason = ""
        if isinstance(command, Germinate):
            place = (command.site, command.seed)
            if place in self.refuse or self.stages.get(place) != Stage.DORMANT:
                reason = f"{place} cannot germinate"
            else:
                self.move(*place, Stage.GERMINATED, command.blueprint or "mlp", command.why)
        elif isinstance(command, Cancel):
            for seed in command.select.seeds or []:
                self.move(command.select.site, seed, Stage.CANCELLED)
        elif isinstance(command, EmergencyStop):
            for seed in command.select.seeds or []:
                self.move(command.select.site, seed, Stage.CULLED, why=command.why)
        self.port.acknowledge(command.id, "refused" if reason else "applied", reason, self.tick)

    @property
    def germinated(self) -> dict[int, list[tuple[str, int]]]:
        """Germinate commands handed to the trainer, by tick."""
        wanted = {t: [(c.site, c.seed) for c in cs if isinstance(c, Germinate)] for t, cs in self.handed.items()}
        return {tick: places for tick, places in wanted.items() if places}

    def answers(self) -> list[Acknowledgement]:
        """Final acknowledgements so far."""
        heard = [d.message for d in self.acks.read(1000)]
        return [message for message in heard if message.status != "delivered"]


@pytest.fixture
def bus(tmp_path: Path) -> Iterator[Any]:
    """A real bus in memory."""
    opened = open_bus(MemoryConfig(), tmp_path)
    yield opened
    opened.close()


@pytest.fixture
def run(bus: Any) -> Callable[..., Run]:
    """``run(controller, name="run")``: a run that has not started."""
    return lambda controller, name="run": Run(bus, controller, name)


@pytest.fixture
def reborn() -> Callable[..., Controller]:
    """``reborn(controller, config, seed=0)``: a new controller with the old one's state, which went through JSON."""

    def make(controller: Controller, config: Any, seed: int = 0) -> Controller:
        after = config.build(seed)
        after.load_state(json.loads(json.dumps(controller.state(), allow_nan=False)))
        return after

    return make
