"""``grafting=learned``: chooses for every seed the strategy that has paid before, and changes it in mid-graft when another has paid better.

It stands around a controller. The controller says what germinates; where it names no strategy, one is chosen here. What a strategy has
paid is the reward of the branches that were blended in by it (``credit``). It is believed as a bandit believes it: a mean of each
strategy, and how that of a site differs from it, so that a site of which little is known leans on the others.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from esper.controllers.base import Controller, command_id
from esper.controllers.view import LOST, Seed
from esper.grafting.config import GraftingConfig, LearnedConfig
from esper.lifecycle.stages import Stage
from esper.messages import (
    CONTROLLER,
    Acknowledgement,
    ApplyEach,
    ApplyTogether,
    ChangeStrategy,
    Command,
    Germinate,
    Message,
    RunStarted,
    Selector,
    Transition,
)

DIGITS = 6
"""Decimals of the numbers that explanations show."""


def with_learned_grafting(controller: Controller, grafting: GraftingConfig, seed: int) -> Controller:
    """The controller, which chooses strategies too if ``grafting`` asks for that. Raises UserError where its memory cannot be read."""
    return LearnedGrafting(controller, grafting, seed) if isinstance(grafting, LearnedConfig) else controller


@dataclass
class _Blending:
    """A seed whose strategy was chosen here: the present one, since when it has been in force, and the ticks under each."""

    strategy: str
    since: int = -1
    ticks: dict[str, int] = field(default_factory=dict)

    def pass_time(self, tick: int) -> None:
        """Count the ticks up to ``tick`` for the present strategy; none before GRAFTING."""
        if self.since >= 0:
            self.ticks[self.strategy] = self.ticks.get(self.strategy, 0) + max(0, tick - self.since)
            self.since = tick

    def shares(self) -> dict[str, float]:
        """The share of its blending that each strategy has; all is the chosen one's where it was never blended."""
        total = sum(self.ticks.values())
        return {name: ticks / total for name, ticks in self.ticks.items() if ticks} if total else {self.strategy: 1.0}


class LearnedGrafting:
    """A controller around another one, whose germinations it gives a strategy."""

    def __init__(self, own: Controller, config: LearnedConfig, seed: int) -> None:
        from esper.controllers.bandit import LOSS
        from esper.controllers.credit import Credit
        from esper.controllers.posterior import Evidence

        self.own, self.config, self.seed = own, config, seed
        self.credit = Credit(LOSS, config.rent, trend=0.5)
        self.known, self.paid = Evidence(), Evidence()
        self.blending: dict[Seed, _Blending] = {}
        self.draws = 0
        self._sites: list[str] = []
        self._asked: dict[str, tuple[Seed, str]] = {}
        self._germinating: dict[Seed, str] = {}
        if config.memory:
            from esper.controllers.memory import read_file

            self.known = read_file(config.memory)

    def __getattr__(self, name: str) -> Any:
        """What the trainer asks of some controllers (``evidence``, ``recall``, …) is the own controller's."""
        if name == "own":
            raise AttributeError(name)
        return getattr(self.own, name)

    # --- hearing ---

    def observe(self, message: Message) -> None:
        """Take note of lives that end and of strategies that change."""
        self.own.observe(message)
        ended = self.credit.observe(message)
        if isinstance(message, RunStarted):
            self._sites = [site["name"] for site in message.sites]
        elif isinstance(message, Acknowledgement) and message.status != "delivered":
            seed, strategy = self._asked.pop(message.command_id, (None, ""))
            if seed in self.blending and message.status == "applied":
                self.blending[seed].pass_time(message.tick)
                self.blending[seed].strategy = strategy
        elif isinstance(message, Transition):
            self._moved(message, ended)

    def _moved(self, event: Transition, ended: Any) -> None:
        seed = (event.site, event.seed)
        if event.target == Stage.GERMINATED:
            self.blending.pop(seed, None)
            if self._germinating.pop(seed, None) == event.strategy or "grafting" in event.why:
                self.blending[seed] = _Blending(event.strategy)
        elif seed in self.blending:
            one = self.blending[seed]
            if event.target == Stage.GRAFTING:
                one.since = event.tick
            elif event.source == Stage.GRAFTING:
                one.pass_time(event.tick)
                one.since = -1
            if event.target == Stage.FOSSILIZED or event.target in LOST:
                del self.blending[seed]
                if ended is not None:
                    self._enter(self.paid, event.site, one, ended.reward)

    def _enter(self, evidence: Any, site: str, one: _Blending, reward: float) -> None:
        shares = one.shares()
        evidence.add(
            {_of(name): share for name, share in shares.items()} | {_of(name, site): share for name, share in shares.items()}, reward
        )

    # --- deciding ---

    def decide(self, tick: int) -> list[Command]:
        """The own controller's commands, with a strategy where it named none, and the changes of strategy that pay."""
        commands = self.own.decide(tick)
        wanting = any(_nameless(command) for command in commands)
        grafting = [(seed, one) for seed, one in self.blending.items() if one.since >= 0]
        if not wanting and not grafting:
            return commands
        posterior = self._posterior()
        return [self._named(command, posterior) for command in commands] + self._changes(tick, grafting, posterior)

    def _changes(self, tick: int, grafting: list[tuple[Seed, _Blending]], posterior: Any) -> list[Command]:
        """Hand over the branches for whose site another strategy is expected to pay ``margin`` more, as far as anything has paid."""
        made: list[Command] = []
        if not self.known.n + self.paid.n:
            return made
        waiting = {seed for seed, _ in self._asked.values()}
        for seed, one in grafting:
            expected = self._values(posterior, posterior.mean, seed[0])
            best = max(expected, key=lambda name: expected[name])
            if seed not in waiting and expected[best] > expected.get(one.strategy, 0.0) + self.config.margin:
                id = f"{command_id(tick, len(made))}-strategy"
                made.append(ChangeStrategy(id=id, select=Selector(site=seed[0], seeds=[seed[1]]), strategy=best))
                self._asked[id] = (seed, best)
        return made

    def _named(self, command: Command, posterior: Any) -> Command:
        """The command with a strategy for everything that germinates by it."""
        if isinstance(command, ApplyTogether | ApplyEach):
            return replace(command, commands=[self._named(part, posterior) for part in command.commands])
        if not isinstance(command, Germinate) or not _nameless(command):
            return command
        sampled = self._values(posterior, posterior.draw(self._lot(), 1)[0], command.site)
        chosen = max(sampled, key=lambda name: sampled[name])
        expected = {name: round(value, DIGITS) for name, value in self._values(posterior, posterior.mean, command.site).items()}
        said = {"chosen": chosen, "sampled": round(sampled[chosen], DIGITS), "expected": expected}
        self._germinating[command.site, command.seed] = chosen
        why = {**command.why, "grafting": said | {"observations": self.known.n + self.paid.n}}
        return replace(command, strategy=chosen, why=why)

    def _values(self, posterior: Any, weights: Any, site: str) -> dict[str, float]:
        """What these weights promise of each strategy at a site."""
        places = posterior.place
        return {name: float(weights[places[_of(name)]] + weights[places[_of(name, site)]]) for name in self.config.strategies}

    def _posterior(self) -> Any:
        from esper.controllers.posterior import Evidence, Posterior

        evidence = Evidence()
        evidence.know([_of(name) for name in self.config.strategies])
        evidence.know([_of(name, site) for site in self._sites for name in self.config.strategies])
        for past in (self.known, self.paid):
            evidence.merge(past)
        return Posterior(evidence, {}, prior_precision=1.0, shape=2.0, scale=self.config.noise**2)

    def _lot(self) -> Any:
        """A separate generator for every choice, so that a checkpoint needs only their number."""
        import numpy as np

        text = "\x1f".join(map(str, (self.seed, CONTROLLER, "learned grafting", self.draws)))
        self.draws += 1
        return np.random.default_rng(int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "big"))

    # --- memory and checkpoints ---

    def strategies_paid(self, tick: int) -> Any:
        """What this run adds to a memory when it has ended at ``tick``; unfinished branches earned nothing and paid their rent."""
        from esper.controllers.posterior import Evidence

        made = Evidence()
        made.merge(self.paid)
        for ended in self.credit.unfinished(tick):
            one = self.blending.get((ended.life.site, ended.life.seed))
            if one is not None:
                self._enter(made, ended.life.site, one, ended.reward)
        return made

    def state(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "own": self.own.state(),
            "credit": self.credit.state(),
            "known": self.known.state(),
            "paid": self.paid.state(),
            "draws": self.draws,
            "blending": [[*seed, one.strategy, one.since, one.ticks] for seed, one in self.blending.items()],
            "asked": [[id, *seed, strategy] for id, (seed, strategy) in self._asked.items()],
            "germinating": [[*seed, strategy] for seed, strategy in self._germinating.items()],
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from ``state``; a memory that was read when this was built gives way to the one that the run began with."""
        from esper.controllers.posterior import Evidence

        self.own.load_state(state["own"])
        self.credit.load_state(state["credit"])
        self.known, self.paid = Evidence.from_state(state["known"]), Evidence.from_state(state["paid"])
        self.draws = state["draws"]
        self.blending = {(site, seed): _Blending(name, since, dict(ticks)) for site, seed, name, since, ticks in state["blending"]}
        self._asked = {id: ((site, seed), strategy) for id, site, seed, strategy in state["asked"]}
        self._germinating = {(site, seed): strategy for site, seed, strategy in state["germinating"]}


def keep_all(controller: Any, memory: str, folder: Path, tick: int) -> None:
    """Keep what a controller has learnt by the run's end, and what strategies have paid, each where it has a memory."""
    from esper.controllers.memory import add_to_file, keep

    if isinstance(controller, LearnedGrafting):
        if controller.config.memory:
            add_to_file(controller.config.memory, controller.strategies_paid(tick))
        controller = controller.own
    if hasattr(controller, "evidence"):
        keep(controller, memory, folder, tick)


def _of(strategy: str, site: str = "") -> str:
    return f"strategy={strategy} at {site}" if site else f"strategy={strategy}"


def _nameless(command: Command) -> bool:
    """Whether something germinates by a command without a strategy, or with ``learned``."""
    if isinstance(command, ApplyTogether | ApplyEach):
        return any(_nameless(part) for part in command.commands)
    return isinstance(command, Germinate) and command.strategy in ("", LearnedConfig.name)
