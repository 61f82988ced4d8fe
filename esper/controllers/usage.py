"""What grows and what has been kept, against several budgets: parameters, MACs, memory, seeds at once, and risk."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from esper.controllers.credit import Ended
from esper.controllers.view import LOST, Seed
from esper.lifecycle.stages import Stage
from esper.messages import Acknowledgement, Germinate, Message, RunStarted, Transition

BUDGETS = ("parameters", "macs", "memory", "seeds", "risk")
SEEDS = BUDGETS.index("seeds")
BYTES = 16
"""Bytes a parameter under AdamW in float32: itself, its gradient and two moments."""
PERMANENT = np.array([1.0, 1.0, 1.0, 0.0, 0.0])
"""The share of each cost that stays when a branch is kept."""


@dataclass
class Usage:
    """Costs ``[5]`` by BUDGETS of every seed that was commanded or lives, and of what was kept; no limit is an infinite one."""

    limits: np.ndarray
    kept: np.ndarray = field(default_factory=lambda: np.zeros(len(BUDGETS)))
    growing: dict[Seed, np.ndarray] = field(default_factory=dict)
    asked: dict[str, list[Seed]] = field(default_factory=dict)
    ends: dict[str, tuple[int, int]] = field(default_factory=dict)
    sites: dict[str, dict[str, Any]] = field(default_factory=dict)
    germinated: int = 0

    def left(self) -> np.ndarray:
        """What of each budget is not used, ``[5]``."""
        return np.asarray(self.limits - self.kept - sum(self.growing.values(), np.zeros(len(BUDGETS))))

    def cost(self, command: Germinate) -> np.ndarray:
        """What a germination costs, ``[5]``; the risk is the share of branches of its blueprint that were lost so far (Laplace's rule)."""
        described = self.sites.get(command.site, {"blueprint": "", "blueprints": {}})
        blueprint = command.blueprint or described["blueprint"]
        adds = described["blueprints"].get(blueprint, {"parameters": 0, "macs": 0})
        lost, all_ = self.ends.get(blueprint, (0, 0))
        parameters = float(adds["parameters"])
        return np.array([parameters, float(adds["macs"]), parameters * BYTES, 1.0, (1.0 + lost) / (2.0 + all_)])

    def never(self, cost: np.ndarray) -> str:
        """The budget that such a cost would overdraw even if nothing else grew; empty where there is none."""
        over = np.greater(cost, self.limits - self.kept + 1e-9)
        return BUDGETS[int(np.argmax(over))] if over.any() else ""

    def sent(self, id: str, commands: list[Germinate]) -> None:
        """These germinations were commanded, by one command."""
        self.asked[id] = [(command.site, command.seed) for command in commands]
        self.germinated += len(commands)
        for command in commands:
            self.growing[command.site, command.seed] = self.cost(command)

    def learn(self, ended: Ended) -> None:
        """Count the end of a branch."""
        lost, all_ = self.ends.get(ended.life.blueprint, (0, 0))
        self.ends[ended.life.blueprint] = (lost + (not ended.kept), all_ + 1)

    def observe(self, message: Message) -> None:
        """Take note of the sites, of refusals, and of branches that come and go."""
        match message:
            case RunStarted():
                self.sites = {site["name"]: site for site in message.sites}
                hosts = [site.get("host_parameters", 0) for site in message.sites]
                self._host = max(hosts, default=0)
            case Acknowledgement() if message.status != "delivered":
                for seed in self.asked.pop(message.command_id, []):
                    if message.status != "applied":
                        self.growing.pop(seed, None)
                        self.germinated -= 1
            case Transition():
                self._moved(message)

    def _moved(self, event: Transition) -> None:
        seed = (event.site, event.seed)
        if event.target == Stage.GERMINATED and seed not in self.growing:  # another one's command
            self.growing[seed] = self.cost(Germinate(id="", site=event.site, seed=event.seed, blueprint=event.blueprint))
        elif event.target == Stage.FOSSILIZED:
            self.kept = self.kept + PERMANENT * self.growing.pop(seed, np.zeros(len(BUDGETS)))
        elif event.target in LOST:
            self.growing.pop(seed, None)

    def limit_growth(self, max_growth: float) -> None:
        """Limit parameters to a multiple of the host's, once RunStarted was heard."""
        if max_growth > 0.0:
            self.limits[0] = min(self.limits[0], max_growth * self._host)

    def state(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "kept": self.kept.tolist(),
            "germinated": self.germinated,
            "growing": [[*seed, cost.tolist()] for seed, cost in self.growing.items()],
            "asked": {id: [list(seed) for seed in seeds] for id, seeds in self.asked.items()},
            "ends": {name: list(counts) for name, counts in self.ends.items()},
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from ``state``."""
        self.kept, self.germinated = np.array(state["kept"], float), int(state["germinated"])
        self.growing = {(site, seed): np.array(cost, float) for site, seed, cost in state["growing"]}
        self.asked = {id: [(site, seed) for site, seed in seeds] for id, seeds in state["asked"].items()}
        self.ends = {name: (int(lost), int(all_)) for name, (lost, all_) in state["ends"].items()}


def limits(parameters: int, macs: int, memory_mb: float, seeds: int, risk: float) -> np.ndarray:
    """The limits by BUDGETS, ``[5]``; 0 stands for none."""
    return np.array([value or math.inf for value in (parameters, macs, memory_mb * 1e6, seeds, risk)], float)
