"""A training run as its bus sees it: stages follow commands, telemetry and events every tick; no network."""

from __future__ import annotations

import time

import numpy as np
import torch

from esper.bus.trainer.bus_port import BusPort
from esper.messages import Checkpoint, Germinate, Metrics, Transition

COLUMNS = ("stage", "alpha", "mean", "variance", "near_zero", "correlation")
SEEDS = 6


def site() -> dict:
    return {
        "name": "fc1",
        "kind": "linear",
        "width": 48,
        "seeds": SEEDS,
        "blueprint": "mlp",
        "blueprints": {"mlp": {"parameters": 10, "macs": 10}},
        "telemetry_every": 1,
        "host_parameters": 1000,
    }


class ScriptedTrainer:
    """Applies Germinate, refuses every third, lets seeds fall dormant again: much to do for a controller."""

    def __init__(self, port: BusPort, total: int, step_s: float = 0.0) -> None:
        self.port, self.total, self.step_s = port, total, step_s
        self.stages = [0] * SEEDS
        self.applied: list[tuple[int, str, int]] = []
        self.tick = 0

    def start(self) -> None:
        """From tick 0, or from where ``load_state`` says."""
        self.port.started(self.tick, self.total, [site() | {"stages": list(self.stages)}])

    def step(self) -> None:
        """One tick."""
        self.tick += 1
        for command in self.port.commands(self.tick):
            self.applied.append((self.tick, command.id, getattr(command, "seed", -1)))
            ok = isinstance(command, Germinate) and self.stages[command.seed] == 0 and len(self.applied) % 3
            if ok:
                self._move(command.seed, 1)
            self.port.acknowledge(command.id, "applied" if ok else "refused", "" if ok else "not now", self.tick)
        if self.tick % 7 == 0:
            for seed, stage in enumerate(self.stages):
                if stage:
                    self._move(seed, 9)
                    self._move(seed, 0)
        rows = np.zeros((SEEDS, len(COLUMNS)), np.float32)
        rows[:, 0] = self.stages
        rows[:, 3] = np.sin(np.arange(SEEDS) + self.tick)
        self.port.telemetry(self.tick, "fc1", torch.from_numpy(rows))
        self.port.emit(Metrics(tick=self.tick, values={"train/loss": 1.0 / self.tick, "validation/loss": 1.0}))
        self.port.end_tick(self.tick)
        time.sleep(self.step_s)

    def state(self) -> dict:
        """What a checkpoint between two ticks needs (JSON-able)."""
        self.port.emit(Checkpoint(tick=self.tick, path="", digest=""))  # for the controller to keep its own state here
        return {"tick": self.tick, "stages": self.stages, "applied": self.applied, "port": self.port.state()}

    def load_state(self, state: dict) -> None:
        """Before ``start``."""
        self.tick, self.stages = state["tick"], state["stages"]
        self.applied = [tuple(entry) for entry in state["applied"]]
        self.port.load_state(state["port"])

    def end(self) -> None:
        self.port.ended(self.tick, "FINISHED", {})
        self.port.close()

    def _move(self, seed: int, target: int) -> None:
        source, self.stages[seed] = self.stages[seed], target
        self.port.emit(Transition(tick=self.tick, site="fc1", seed=seed, branch=-1, source=source, target=target, cause="test"))
