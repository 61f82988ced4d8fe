"""``heuristic``: germinates where the host's capacity lies idle, at a set time or when learning stalls."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from esper.controllers.base import command_id
from esper.controllers.bookkeeping import Attempts, Budget, Plateau
from esper.controllers.view import RunView, Seed, check_duration
from esper.errors import UserError
from esper.messages import Command, Germinate, Message, Metrics, RunStarted, Telemetry
from esper.processes import ControllerPlace
from esper.setting_fields import setting


@dataclass
class HeuristicConfig(ControllerPlace):
    """When a wave of germinations starts, its size, its places and its limit of parameters."""

    name: str = "heuristic"
    germinate_at: str = setting("10%", unit="duration or empty", help="time of the first wave; empty: only plateaus start waves")
    plateau: str = setting("", unit="duration or empty", help="a wave starts after this long without improvement; empty: never")
    metric: str = setting("validation/loss", help="whose plateau counts")
    direction: str = setting("min", choices=("min", "max"), help="which way that metric gets better")
    min_improvement: float = setting(0.001, low=0.0, help="smallest improvement that ends a plateau, as a share of the best")
    until: str = setting("50%", unit="duration", help="no germination after this: growing late does less")
    count: int = setting(4, low=0, high=10**6, unit="seeds", help="germinations of one wave")
    max_active: int = setting(4, low=1, unit="seeds", help="most seeds between GERMINATED and FINE_TUNING at a time")
    max_parameters: int = setting(0, low=0, help="most parameters that all branches may add; 0: no limit")
    max_growth: float = setting(0.0, low=0.0, unit="hosts", help="the same as a multiple of the host's; 0: no limit")
    variance: float = setting(0.6, low=-1.0, high=1.0, help="weight of a low activation variance")
    near_zero: float = setting(0.3, low=-1.0, high=1.0, help="weight of the fraction of activations near zero")
    correlation: float = setting(0.1, low=-1.0, high=1.0, help="weight of the correlation with the rest of the site")
    blueprint: str = setting("", help="what germinates; empty: the run's blueprint")
    strategy: str = setting("", help="how it is blended in; empty: the run's grafting")
    embargo: str = setting("10%", unit="duration", help="how long a refused or culled seed is not tried again")

    def build(self, seed: int) -> HeuristicController:
        """The controller; the run's ``seed`` is not used. Raises UserError when nothing can ever start a wave."""
        for text in filter(None, (self.germinate_at, self.plateau, self.until, self.embargo)):
            check_duration(text)
        if not self.germinate_at and not self.plateau:
            raise UserError(
                "controller.germinate_at and controller.plateau are both empty, so nothing would ever germinate; "
                "give one of them (e.g. 10%), or choose controller=none."
            )
        return HeuristicController(self)


class HeuristicController:
    """Starts waves, and fills each with the dormant seeds that score highest as far as room and budget allow."""

    def __init__(self, config: HeuristicConfig) -> None:
        from esper.controllers.health import Health  # here, since the settings above must not wait for numpy
        from esper.controllers.places import Places

        self.config = config
        self.view = RunView()
        self.places = Places()
        self.attempts = Attempts()
        self.health = Health()
        self.budget = Budget(config.blueprint, config.max_parameters, config.max_growth)
        self.plateau = Plateau(config.direction, config.min_improvement)
        self.first_done = not config.germinate_at
        self.goal = 0  # germinations of all waves so far, counted when they are applied

    def observe(self, message: Message) -> None:
        """Take note of messages that bear on when, where and how much to grow."""
        self.view.observe(message)
        self.places.observe(message)
        self.attempts.observe(message)
        self.budget.observe(message)
        if isinstance(message, RunStarted):
            self.attempts.rest_ticks = self.view.ticks(self.config.embargo)
            self.budget.check()
            self._check_times(message)
        elif isinstance(message, Telemetry):
            self.health.observe(message)
        elif isinstance(message, Metrics) and self.config.metric in message.values:
            self.plateau.observe(message.tick, message.values[self.config.metric])

    def _check_times(self, started: RunStarted) -> None:
        """Raise UserError where the start of every wave, or the first telemetry, would come after the last germination."""
        config, ticks = self.config, self.view.ticks
        last = min(ticks(config.until), self.view.last_decision)
        end = f"nothing germinates after tick {last} of {started.total_ticks} (controller.until={config.until}), so nothing ever would"
        if config.germinate_at and ticks(config.germinate_at) > last:
            at = f"controller.germinate_at={config.germinate_at} is tick {ticks(config.germinate_at)}"
            raise UserError(f"{at}, and {end}; give an earlier time, or a later until.")
        if not config.germinate_at and ticks(config.plateau) >= last:
            lasts = f"controller.plateau={config.plateau} lasts {ticks(config.plateau)} ticks"
            raise UserError(f"{lasts}, and {end}; give a shorter plateau, or a later until.")
        first = min(site["telemetry_every"] for site in started.sites)
        if first > last:
            raise UserError(
                f"The first telemetry, by which the heuristic chooses seeds, comes at tick {first} (telemetry.every), and {end}; "
                "lower telemetry.every, or choose controller=random."
            )

    def decide(self, tick: int) -> list[Command]:
        """Germinate the best seeds that the present wave still wants."""
        if not self.view.started or tick > self.view.ticks(self.config.until):
            return []
        self._start_wave(tick)
        wanted = self.goal - self.attempts.applied - len(self.attempts.open)
        if wanted <= 0:
            return []
        room = max(0, min(wanted, self.config.max_active - len(self.places.active | set(self.attempts.open))))
        places = self._affordable(self._ranked(tick, room), room) if room else []
        return [self._germinate(tick, n, place, need) for n, (place, need) in enumerate(places)]

    def _start_wave(self, tick: int) -> None:
        if not self.first_done and tick >= self.view.ticks(self.config.germinate_at):
            self.first_done = True
        elif not self.config.plateau or self.plateau.lasts(tick) < self.view.ticks(self.config.plateau):
            return
        # Germinations that an earlier wave could not place are not added to this one: the seeds it lacked are the same.
        self.goal = self.attempts.applied + len(self.attempts.open) + self.config.count
        self.plateau.restart(tick)

    def _ranked(self, tick: int, room: int) -> Iterator[tuple[Seed, float]]:
        """Dormant seeds that may be tried with their scores, the neediest first; equal ones in the order of sites and seeds.

        Mostly the first ``room`` are wanted, so the others, which may be a hundred thousand, are sorted only when they are asked for.
        """
        import numpy as np

        weights = (self.config.variance, self.config.near_zero, self.config.correlation)
        counts = np.diff(self.places.first).tolist()
        scores = [self.health.scores(name, count, weights) for name, count in zip(self.places.names, counts, strict=True)]
        score = np.concatenate(scores) if scores else np.zeros(0)
        score[~self.places.free(self.attempts.unavailable(tick))] = np.nan
        # The best of as many sites as there is room are as good as the last of these, so no seed below it comes among the first.
        best = np.sort(np.fmax.reduceat(score, self.places.first[:-1])) if len(score) else score
        best = best[~np.isnan(best)]
        least = best[-room] if len(best) >= room else -np.inf
        for some in (score >= least, score < least):
            rows = np.flatnonzero(some)
            for row in rows[np.argsort(-score[rows], kind="stable")]:
                yield self.places.seed(int(row)), float(score[row])

    def _affordable(self, places: Iterator[tuple[Seed, float]], room: int) -> list[tuple[Seed, float]]:
        """The first ``room`` of the ``places`` that fit the budget."""
        left = self.budget.limit - self.budget.used - sum(self.budget.cost(site) for site, _ in self.attempts.open)
        fitting: list[tuple[Seed, float]] = []
        for place, need in places:
            cost = self.budget.cost(place[0])
            if cost <= left:
                left -= cost
                fitting.append((place, need))
                if len(fitting) == room:
                    break
        return fitting

    def _germinate(self, tick: int, n: int, place: Seed, need: float) -> Germinate:
        site, seed = place
        blueprint, strategy = self.config.blueprint, self.config.strategy
        why = {"controller": self.config.name, "need": round(need, 4)}
        command = Germinate(id=command_id(tick, n), site=site, seed=seed, blueprint=blueprint, strategy=strategy, why=why)
        self.attempts.sent(command)
        return command

    def state(self) -> dict[str, Any]:
        """JSON-able."""
        parts = {name: getattr(self, name).state() for name in ("view", "attempts", "health", "budget", "plateau")}
        return parts | {"first_done": self.first_done, "goal": self.goal}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from ``state``."""
        for name in ("view", "attempts", "health", "budget", "plateau"):
            getattr(self, name).load_state(state[name])
        self.places.load_state(state["view"])
        self.first_done, self.goal = state["first_done"], state["goal"]
