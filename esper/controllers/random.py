"""``random``: the control arm. It germinates a set number of seeds, at random places and times."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from typing import Any

from esper.controllers.base import command_id
from esper.controllers.bookkeeping import Attempts
from esper.controllers.view import RunView, check_duration, refuse_unfitting
from esper.errors import UserError
from esper.lifecycle.stages import Stage
from esper.messages import CONTROLLER, Command, Germinate, Message, RunStarted
from esper.processes import ControllerPlace
from esper.setting_fields import setting


@dataclass
class RandomConfig(ControllerPlace):
    """The number of seeds, and the span in which they germinate."""

    name: str = "random"
    count: int = setting(4, low=0, high=10**6, unit="seeds", help="seeds that germinate in the run; a refused one is replaced")
    earliest: str = setting("10%", unit="duration", help="times are drawn evenly from here …")
    latest: str = setting("10%", unit="duration", help="… to here; the same time for both draws places alone")
    site: str = setting("*", help="sites among which places are drawn (name or glob)")
    blueprint: str = setting("", help="what germinates; empty: the run's blueprint")
    strategy: str = setting("", help="how it is blended in; empty: the run's grafting")
    embargo: str = setting("10%", unit="duration", help="how long a refused or culled seed is not tried again")

    def build(self, seed: int) -> RandomController:
        """The controller, drawing from its own generator, a function of the run's random ``seed``."""
        for text in (self.earliest, self.latest, self.embargo):
            check_duration(text)
        return RandomController(self, seed)


class RandomController:
    """Draws its times when the run starts, and a place among the dormant seeds when a time has come."""

    def __init__(self, config: RandomConfig, seed: int) -> None:
        self.config = config
        self.seed = seed
        self.view = RunView()
        self.attempts = Attempts()
        self.times: list[int] = []
        self.draws = 0

    def observe(self, message: Message) -> None:
        """Take note of the run's start, of stages and of answers."""
        self.view.observe(message)
        self.attempts.observe(message)
        if isinstance(message, RunStarted):
            self.attempts.rest_ticks = self.view.ticks(self.config.embargo)
            self.times = self._draw_times()

            where = f"that controller.site={self.config.site} matches"
            refuse_unfitting(self.view.matching(self.config.site), self.config.blueprint, where)

    def _draw_times(self) -> list[int]:
        first, last = self.view.ticks(self.config.earliest), self.view.ticks(self.config.latest)
        if first > last:
            raise UserError(
                f"controller.earliest={self.config.earliest} is after controller.latest={self.config.latest}; "
                "give a time span that does not end before it begins."
            )
        if first > self.view.last_decision:
            raise UserError(
                f"controller.earliest={self.config.earliest} is tick {first}, and what is decided after tick {self.view.last_decision} "
                "comes too late for this run; give an earlier time."
            )
        last = min(last, self.view.last_decision)
        lot = self._lot("times")
        return sorted(lot.randint(first, last) for _ in range(self.config.count))

    def _lot(self, *purpose: str | int) -> random.Random:
        """A separate generator for one purpose, so that a checkpoint needs only the number of draws."""
        text = "\x1f".join(map(str, (self.seed, CONTROLLER, *purpose)))
        return random.Random(int.from_bytes(hashlib.sha256(text.encode()).digest(), "big"))

    def decide(self, tick: int) -> list[Command]:
        """Germinate the seeds that are due and neither applied nor under way."""
        due = sum(time <= tick for time in self.times) - self.attempts.applied - len(self.attempts.open)
        commands: list[Command] = []
        for n in range(due):
            places = self.view.seeds(self.config.site, Stage.DORMANT)
            places = [place for place in places if self.attempts.may_try(place, tick)]
            if not places:
                break
            site, seed = self._lot("place", self.draws).choice(places)
            self.draws += 1
            command = Germinate(
                id=command_id(tick, n),
                site=site,
                seed=seed,
                blueprint=self.config.blueprint,
                strategy=self.config.strategy,
            )
            self.attempts.sent(command)
            commands.append(command)
        return commands

    def state(self) -> dict[str, Any]:
        """JSON-able; the times are drawn again when the run continues."""
        return {"view": self.view.state(), "attempts": self.attempts.state(), "draws": self.draws}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from ``state``."""
        self.view.load_state(state["view"])
        self.attempts.load_state(state["attempts"])
        self.draws = state["draws"]
