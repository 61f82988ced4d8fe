"""``probe``: grows several candidates, and keeps those that have gained most for their cost after a short trial."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from itertools import product
from typing import Any

from esper.controllers.base import command_id
from esper.controllers.bookkeeping import Attempts, Budget
from esper.controllers.view import ACTIVE, RunView, Seed, check_duration, refuse_unfitting
from esper.errors import UserError
from esper.lifecycle.stages import Stage
from esper.messages import CONTROLLER, Acknowledgement, Command, EmergencyStop, GateResult, Germinate, Message, RunStarted, Selector
from esper.processes import ControllerPlace
from esper.setting_fields import setting


@dataclass
class ProbeConfig(ControllerPlace):
    """When trials begin, how many candidates there are, and how many are kept."""

    name: str = "probe"
    germinate_at: str = setting("10%", unit="duration", help="time of the first trial")
    until: str = setting("50%", unit="duration", help="no trial begins after this")
    pause: str = setting("5%", unit="duration", help="time from the end of a trial to the next one")
    trial: str = setting("15%", unit="duration", help="longest trial; what has not been judged by then has lost")
    candidates: int = setting(
        6, low=2, high=1000, unit="seeds", help="branches of one trial; lifecycle.training_slots of them learn at once"
    )
    most: int = setting(0, low=0, unit="seeds", help="germinations of the whole run, at most; 0: no limit")
    keep: int = setting(2, low=1, unit="seeds", help="winners of one trial, at most")
    sites: list[str] = setting(["*"], help="globs over the sites among which candidates are spread")
    blueprints: list[str] = setting([], help="what candidates are made of, in turn; empty: the run's blueprint")
    strategies: list[str] = setting([], help="how candidates are blended in, in turn; empty: the run's grafting")
    max_parameters: int = setting(0, low=0, help="most parameters that all branches may add; 0: no limit")
    max_growth: float = setting(0.0, low=0.0, unit="hosts", help="the same as a multiple of the host's; 0: no limit")
    embargo: str = setting("10%", unit="duration", help="how long a refused or culled seed is not tried again")

    def build(self, seed: int) -> ProbeController:
        """The controller; its candidates are drawn from a generator of its own.

        Raises:
            UserError: a duration in epochs, an unknown strategy, no fewer winners than candidates.
        """
        from esper.grafting.config import CONFIGS

        for text in (self.germinate_at, self.until, self.pause, self.trial, self.embargo):
            check_duration(text)
        for name in self.strategies:
            if name not in CONFIGS:
                raise UserError(f"controller.strategies names '{name}'; there are {', '.join(CONFIGS)}.")
        if self.keep >= self.candidates:
            raise UserError(f"controller.keep={self.keep} of controller.candidates={self.candidates} leaves nothing to rank; keep fewer.")
        return ProbeController(self, seed)


class ProbeController:
    """One trial at a time: candidates germinate together, are judged for the first time, and all but the best go."""

    def __init__(self, config: ProbeConfig, seed: int) -> None:
        self.config, self.seed = config, seed
        self.view, self.attempts = RunView(), Attempts()
        self.budget = Budget("", config.max_parameters, config.max_growth)
        self.running: dict[Seed, float | None] = {}
        self.names: dict[Seed, str] = {}
        self.began = self.next = -1
        self.trials = 0

    # --- hearing ---

    def observe(self, message: Message) -> None:
        """Take note of the sites, of candidates that come and go, and of what the judge says of them."""
        self.view.observe(message)
        self.attempts.observe(message)
        self.budget.observe(message)
        if isinstance(message, RunStarted):
            self._begin()
        elif isinstance(message, GateResult) and message.gate == "gain" and message.look == 1:
            if (message.site, message.seed) in self.running:
                self.running[message.site, message.seed] = message.value
        elif isinstance(message, Acknowledgement) and message.status == "refused":
            asked = set(self.attempts.open)
            for seed in [seed for seed in self.running if self.view.stages.get(seed) == Stage.DORMANT and seed not in asked]:
                del self.running[seed]

    def _begin(self) -> None:
        """Settings against the run. Raises UserError where no trial could ever begin."""
        config, ticks = self.config, self.view.ticks
        self.attempts.rest_ticks = ticks(config.embargo)
        if self.next < 0:
            self.next = ticks(config.germinate_at)
        last = min(ticks(config.until), self.view.last_decision)
        if ticks(config.germinate_at) > last:
            raise UserError(
                f"controller.germinate_at={config.germinate_at} is tick {ticks(config.germinate_at)}, and no trial begins after tick "
                f"{last} (controller.until={config.until}); give an earlier time."
            )
        sites = [site for pattern in config.sites for site in self.view.matching(pattern)]
        for name in config.blueprints or [""]:
            refuse_unfitting(sites, name, f"that controller.sites={config.sites} matches")
        self.budget.check(config.blueprints or [""])

    # --- deciding ---

    def decide(self, tick: int) -> list[Command]:
        """Begin a trial when its time has come, and end one when all of it is known."""
        if not self.view.started:
            return []
        if self.running:
            return self._end(tick) if self._over(tick) else []
        if tick >= self.next and tick <= self.view.ticks(self.config.until) and self._wanted() > 0:
            return list(self._start(tick))
        return []

    def _start(self, tick: int) -> list[Germinate]:
        """Candidates at free places, spread over the sites, with the blueprints and strategies in turn."""
        lot = self._lot()
        arms = list(product(self.config.blueprints or [""], self.config.strategies or [""]))
        lot.shuffle(arms)
        left = self.budget.limit - self.budget.used
        commands: list[Germinate] = []
        for site, seed in self._places(tick, lot):
            blueprint, strategy = arms[len(commands) % len(arms)]
            described, cost = self.view.sites[site], self.budget.cost(site, blueprint)
            if (blueprint or described["blueprint"]) not in described["blueprints"] or cost > left:
                continue
            left -= cost
            why = {"controller": self.config.name, "trial": self.trials, "candidate": len(commands)}
            id = command_id(tick, len(commands))
            command = Germinate(id=id, site=site, seed=seed, blueprint=blueprint, strategy=strategy, why=why)
            self.attempts.sent(command)
            commands.append(command)
            self.names[site, seed] = blueprint
            if len(commands) == self._wanted():
                break
        self.running = {(command.site, command.seed): None for command in commands}
        self.began, self.trials = tick, self.trials + 1
        if not commands:
            self.next = tick + max(1, self.view.ticks(self.config.pause))
        return commands

    def _wanted(self) -> int:
        """Candidates of the next trial."""
        left = self.config.most - self.attempts.applied if self.config.most else self.config.candidates
        return min(self.config.candidates, left)

    def _places(self, tick: int, lot: random.Random) -> list[Seed]:
        """Free seeds, one of every site in turn, in an order that is drawn."""
        names = {site["name"] for pattern in self.config.sites for site in self.view.matching(pattern)}
        by_site: dict[str, list[Seed]] = {}
        for seed in self.view.seeds(stage=Stage.DORMANT):
            if seed[0] in names and self.attempts.may_try(seed, tick):
                by_site.setdefault(seed[0], []).append(seed)
        columns = list(by_site.values())
        lot.shuffle(columns)
        for column in columns:
            lot.shuffle(column)
        return [column[place] for place in range(max(map(len, columns), default=0)) for column in columns if place < len(column)]

    def _over(self, tick: int) -> bool:
        waiting = [seed for seed, gain in self.running.items() if gain is None and self._lives(seed)]
        return not waiting or tick - self.began > self.view.ticks(self.config.trial)

    def _lives(self, seed: Seed) -> bool:
        return self.view.stages.get(seed, 0) in ACTIVE or seed in self.attempts.open

    def _end(self, tick: int) -> list[Command]:
        """Send away all but the candidates that gain most for their cost."""
        judged = {seed: gain for seed, gain in self.running.items() if gain is not None and gain > 0.0 and self._lives(seed)}
        cost = {seed: max(1, self.budget.cost(seed[0], self.names[seed])) for seed in judged}
        ranked = sorted(judged, key=lambda seed: (-judged[seed] / cost[seed], seed))
        losers = [seed for seed in self.running if seed not in ranked[: self.config.keep] and self._lives(seed)]
        self.running, self.names = {}, {}
        self.next = tick + self.view.ticks(self.config.pause)
        return [self._dismiss(tick, n, seed) for n, seed in enumerate(losers)]

    def _dismiss(self, tick: int, n: int, seed: Seed) -> EmergencyStop:
        """Stopped, not moved: a loser that passed its first look is in FINE_TUNING by now, which has a least age."""
        return EmergencyStop(
            id=command_id(tick, n), select=Selector(site=seed[0], seeds=[seed[1]]), reason="others gained more in the trial"
        )

    def _lot(self) -> random.Random:
        """A separate generator for every trial."""
        text = "\x1f".join(map(str, (self.seed, CONTROLLER, self.config.name, self.trials)))
        return random.Random(int.from_bytes(hashlib.sha256(text.encode()).digest(), "big"))

    # --- checkpoints ---

    def state(self) -> dict[str, Any]:
        """JSON-able."""
        running = [[*seed, gain, self.names[seed]] for seed, gain in self.running.items()]
        parts = {name: getattr(self, name).state() for name in ("view", "attempts", "budget")}
        return parts | {"running": running, "began": self.began, "next": self.next, "trials": self.trials}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from ``state``."""
        for name in ("view", "attempts", "budget"):
            getattr(self, name).load_state(state[name])
        self.running = {(site, seed): gain for site, seed, gain, _ in state["running"]}
        self.names = {(site, seed): name for site, seed, _, name in state["running"]}
        self.began, self.next, self.trials = state["began"], state["next"], state["trials"]
