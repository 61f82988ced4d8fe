"""Bookkeeping of the controllers: open germinations, parameters grown, and plateaus of a metric."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from esper.controllers.view import LOST, Seed, refuse_unfitting
from esper.errors import UserError
from esper.lifecycle.stages import Stage
from esper.messages import Acknowledgement, Germinate, Message, RunStarted, Transition


class Attempts:
    """Remembers Germinate commands until their acknowledgement, and lets a refused or lost seed rest."""

    def __init__(self) -> None:
        self.rest_ticks = 0
        self.applied = 0
        self._open: dict[str, Seed] = {}
        self._resting: dict[Seed, int] = {}

    @property
    def open(self) -> list[Seed]:
        """Seeds whose Germinate command was not acknowledged yet."""
        return list(self._open.values())

    def sent(self, command: Germinate) -> None:
        """A command is on its way."""
        self._open[command.id] = (command.site, command.seed)

    def observe(self, message: Message) -> None:
        """Take note of acknowledgements and of seeds that lost their branch."""
        if isinstance(message, Acknowledgement) and message.status != "delivered":
            seed = self._open.pop(message.command_id, None)
            if seed is not None and message.status == "applied":
                self.applied += 1
            elif seed is not None:
                self._resting[seed] = message.tick + self.rest_ticks
        elif isinstance(message, Transition) and message.target in LOST:
            self._resting[message.site, message.seed] = message.tick + self.rest_ticks

    def may_try(self, seed: Seed, tick: int) -> bool:
        """Whether the seed neither waits for an answer nor rests at ``tick``."""
        return seed not in self._open.values() and self._resting.get(seed, -1) < tick

    def unavailable(self, tick: int) -> list[Seed]:
        """Seeds that wait for an answer or rest at ``tick``."""
        return [*self._open.values(), *(seed for seed, until in self._resting.items() if until >= tick)]

    def state(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "applied": self.applied,
            "open": [[id, *seed] for id, seed in self._open.items()],
            "resting": [[*seed, until] for seed, until in self._resting.items()],
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from ``state``."""
        self.applied = state["applied"]
        self._open = {id: (site, seed) for id, site, seed in state["open"]}
        self._resting = {(site, seed): until for site, seed, until in state["resting"]}


class Budget:
    """Parameters of the branches under way and kept, against a limit.

    Reads of each site's dict in RunStarted: ``blueprints`` ({name: {"parameters": …}}), ``blueprint`` (the run's own,
    for which an empty name in a command stands) and ``host_parameters``.
    """

    def __init__(self, blueprint: str, max_parameters: int, max_growth: float) -> None:
        self._blueprint = blueprint
        self._max_parameters, self._max_growth = max_parameters, max_growth
        self.limit = math.inf
        self._sites: dict[str, dict[str, Any]] = {}
        self._grown: dict[Seed, int] = {}
        self._kept = 0

    @property
    def used(self) -> int:
        """Parameters of all branches under way or FOSSILIZED."""
        return self._kept + sum(self._grown.values())

    def observe(self, message: Message) -> None:
        """Take note of the sites and of branches that come and go."""
        if isinstance(message, RunStarted):
            self._sites = {site["name"]: site for site in message.sites}
            self.limit = self._find_limit()
        elif isinstance(message, Transition):
            seed = (message.site, message.seed)
            if message.target == Stage.GERMINATED:
                self._grown[seed] = self.cost(message.site, message.blueprint)
            elif message.target == Stage.FOSSILIZED:
                self._kept += self._grown.pop(seed, 0)
            elif message.target in LOST:
                self._grown.pop(seed, None)

    def _find_limit(self) -> float:
        limit = float(self._max_parameters) or math.inf
        if self._max_growth > 0.0:
            hosts = [site["host_parameters"] for site in self._sites.values() if "host_parameters" in site]
            assert hosts, "RunStarted says no host_parameters, so max_growth has nothing to be a multiple of"
            limit = min(limit, self._max_growth * max(hosts))
        return limit

    def cost(self, site: str, blueprint: str = "") -> int:
        """Parameters that a branch at ``site`` adds; of an unknown blueprint, as many as the largest there."""
        described = self._sites[site]
        costs = {name: int(adds["parameters"]) for name, adds in described.get("blueprints", {}).items()}
        wanted = blueprint or self._blueprint or described.get("blueprint", "")
        return costs.get(wanted, max(costs.values(), default=0))

    def check(self, choices: Iterable[str] = ("",)) -> None:
        """Raise UserError when the wanted blueprint fits none of the sites, or the limit not even one branch of any of ``choices``."""
        if self._blueprint:
            refuse_unfitting(self._sites.values(), self._blueprint, "of this host")
        cheapest = min((self.cost(site, blueprint) for site in self._sites for blueprint in choices), default=0)
        if cheapest > self.limit:
            raise UserError(
                f"controller.max_parameters={self._max_parameters} and controller.max_growth={self._max_growth} allow "
                f"{self.limit:.0f} parameters, and the smallest branch has {cheapest}, so nothing would ever germinate; raise the "
                "limit, or choose a smaller blueprint."
            )

    def state(self) -> dict[str, Any]:
        """JSON-able."""
        return {"grown": [[*seed, size] for seed, size in self._grown.items()], "kept": self._kept}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from ``state``."""
        self._grown = {(site, seed): size for site, seed, size in state["grown"]}
        self._kept = state["kept"]


class Plateau:
    """The best value so far, and the tick since which there was none better.

    A value is better if it improves by more than ``min_improvement`` of the best value's size. A value that is not finite
    is ignored.
    """

    def __init__(self, direction: str, min_improvement: float) -> None:
        assert direction in ("min", "max"), direction
        self._sign = 1.0 if direction == "max" else -1.0
        self._min_improvement = min_improvement
        self.best: float | None = None
        self.since = 0

    def observe(self, tick: int, value: float) -> None:
        """A measurement."""
        if not math.isfinite(value):
            return
        least = -math.inf if self.best is None else self._sign * self.best + self._min_improvement * abs(self.best)
        if self._sign * value > least:
            self.best, self.since = value, tick

    def lasts(self, tick: int) -> int:
        """Ticks without improvement; 0 before the first measurement."""
        return tick - self.since if self.best is not None else 0

    def restart(self, tick: int) -> None:
        """Start counting again at ``tick``, after an action."""
        self.since = tick

    def state(self) -> dict[str, Any]:
        """JSON-able."""
        return {"best": self.best, "since": self.since}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from ``state``."""
        self.best, self.since = state["best"], state["since"]
