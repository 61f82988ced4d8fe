"""``bandit``: chooses site, blueprint, strategy and objective by Thompson sampling, and learns from what earlier branches were worth."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

from esper.controllers.base import command_id
from esper.controllers.bookkeeping import Attempts, Budget
from esper.controllers.heuristic import HeuristicConfig
from esper.controllers.view import Seed, check_duration, check_times
from esper.errors import UserError
from esper.lifecycle.duration import parse
from esper.messages import CONTROLLER, Command, Germinate, Message, RunStarted, Telemetry
from esper.processes import ControllerPlace
from esper.setting_fields import setting

LOSS = "validation/loss"
"""The metric from which the host's own learning is extrapolated, and of which gains are shares."""
SHOWN_SITES = 3
"""Sites whose probability an explanation names."""
PROBABILITY_DRAWS = 32


@dataclass
class BanditConfig(ControllerPlace):
    """When it decides, what it chooses from, how it is paid, and the memory that it begins with."""

    name: str = "bandit"
    germinate_at: str = setting("10%", unit="duration", help="time of the first decision")
    every: str = setting("5%", unit="duration", help="time between two decisions")
    until: str = setting("50%", unit="duration", help="no germination after this: growing late does less")
    count: int = setting(2, low=1, high=10**6, unit="seeds", help="most germinations of one decision")
    most: int = setting(0, low=0, unit="seeds", help="germinations of the whole run, at most; 0: no limit")
    max_active: int = setting(4, low=1, unit="seeds", help="most seeds between GERMINATED and FINE_TUNING at a time")
    max_parameters: int = setting(0, low=0, help="most parameters that all branches may add; 0: no limit")
    max_growth: float = setting(0.0, low=0.0, unit="hosts", help="the same as a multiple of the host's; 0: no limit")
    blueprints: list[str] = setting([], help="what may germinate; empty: affine, low_rank, mlp, glu and conv, or a block's or width's own")
    strategies: list[str] = setting([], help="how it may be blended in; empty: linear, drift, momentum and grad_norm")
    objectives: list[str] = setting([], help="what it may learn from in TRAINING; empty: shadow and functional_gradient where they can be")
    rent: float = setting(0.02, low=0.0, high=1.0, help="reward that a whole run at alpha 0 costs: gains are shares of the loss")
    trend: float = setting(0.5, low=0.0, high=1.0, help="share of the host's extrapolated own learning that is no branch's gain")
    optimism: float = setting(0.05, low=-1.0, high=1.0, help="reward expected of a branch of which nothing is known")
    need: float = setting(
        0.3, low=0.0, high=10.0, help="how much more is expected at first of a seed of heuristic score 1 than of one of 0"
    )
    noise: float = setting(0.05, low=1e-6, high=10.0, help="standard deviation of a reward that is assumed at first")
    memory: str = setting("", help="experience of earlier runs: a .json file, or the name of an MLflow experiment")
    embargo: str = setting("10%", unit="duration", help="how long a refused or culled seed is not tried again")

    def build(self, seed: int) -> BanditController:
        """The controller; it draws from its own generator, a function of the run's random ``seed``.

        Raises:
            UserError: a duration in epochs, an unknown strategy or objective, a memory that cannot be read.
        """
        from esper.grafting.config import CONFIGS
        from esper.lifecycle.config import OBJECTIVES

        for text in (self.germinate_at, self.every, self.until, self.embargo):
            check_duration(text)
        for key, known in (("strategies", list(CONFIGS)), ("objectives", list(OBJECTIVES))):
            for name in getattr(self, key):
                if name not in known:
                    raise UserError(f"controller.{key} names '{name}'; there are {', '.join(known)}.")
        made = BanditController(self, seed)
        if self.memory.endswith(".json"):
            from esper.controllers.memory import read_file

            made.recall(read_file(self.memory))
        return made


@dataclass(frozen=True)
class _Choice:
    """One decision: what germinates where, and its explanation."""

    place: Seed
    arm: dict[str, str]
    why: dict[str, Any]


class BanditController:
    """Decides every so often; a life that ends is one more observation of its posterior."""

    def __init__(self, config: BanditConfig, seed: int) -> None:
        from esper.controllers.arms import Arms
        from esper.controllers.credit import Credit
        from esper.controllers.health import Health
        from esper.controllers.places import Places
        from esper.controllers.posterior import Evidence

        self.config, self.seed = config, seed
        self.places, self.attempts = Places(), Attempts()
        self.budget = Budget("", config.max_parameters, config.max_growth)
        self.health, self.arms = Health(), Arms(config.blueprints, config.strategies, config.objectives)
        self.credit = Credit(LOSS, config.rent, config.trend)
        self.known, self.own = Evidence(), Evidence()
        self.draws = 0
        self.total = 0

    def recall(self, evidence: Any) -> None:
        """Begin with what earlier runs have learnt."""
        self.known.merge(evidence)

    def evidence(self, tick: int) -> Any:
        """What this run adds to a memory when it has ended at ``tick``; unfinished branches earned nothing and paid their rent."""
        from esper.controllers.posterior import Evidence

        made = Evidence()
        made.merge(self.own)
        for ended in self.credit.unfinished(tick):
            _reward(made, ended)
        return made

    # --- hearing ---

    def observe(self, message: Message) -> None:
        """Take note of messages that bear on what to grow, and of lives that end."""
        self.places.observe(message)
        self.attempts.observe(message)
        self.budget.observe(message)
        ended = self.credit.observe(message)
        if ended is not None:
            _reward(self.own, ended)
        if isinstance(message, RunStarted):
            self.total = message.total_ticks
            self.attempts.rest_ticks = self._ticks(self.config.embargo)
            self.arms.begin(message.sites)
            self.budget.check({blueprint for blueprint, _, _ in self.arms.arms})
            check_times(self.config.germinate_at, self.config.until, message)
        elif isinstance(message, Telemetry):
            self.health.observe(message)
            self.arms.hear(message)

    def _ticks(self, text: str) -> int:
        return parse(text).ticks(self.total, 0)

    # --- deciding ---

    def decide(self, tick: int) -> list[Command]:
        """Germinate what a draw from the posterior finds best, and nothing where it finds that nothing pays."""
        since = tick - self._ticks(self.config.germinate_at) if self.total else -1
        if since < 0 or tick > self._ticks(self.config.until) or since % max(1, self._ticks(self.config.every)):
            return []
        room = min(self.config.count, self.config.max_active - len(self.places.active | set(self.attempts.open)))
        if self.config.most:
            room = min(room, self.config.most - self.attempts.applied - len(self.attempts.open))
        if room <= 0:
            return []
        commands: list[Command] = []
        posterior = self._posterior()
        left = self.budget.limit - self.budget.used - sum(self.budget.cost(site, "any") for site, _ in self.attempts.open)
        self.arms.look(self.health, self.places, self.places.free(self.attempts.unavailable(tick)), tick / self.total)
        for n in range(room):
            choice = self._choose(posterior, left)
            if choice is None:
                break
            self.arms.take(self.places.row(choice.place))
            arm = choice.arm
            command = Germinate(
                id=command_id(tick, n),
                site=choice.place[0],
                seed=choice.place[1],
                blueprint=arm["blueprint"],
                strategy=arm["strategy"],
                objective=arm["objective"],
                why=choice.why,
            )
            self.attempts.sent(command)
            left -= self.budget.cost(command.site, arm["blueprint"])
            commands.append(command)
        return commands

    def _posterior(self) -> Any:
        from esper.controllers.posterior import Evidence, Posterior

        evidence = Evidence()
        evidence.know(self.arms.names)
        for past in (self.known, self.own):
            evidence.merge(past)
        prior = {"bias": self.config.optimism} | self._expected_of_need()
        return Posterior(evidence, prior, prior_precision=1.0, shape=2.0, scale=self.config.noise**2)

    def _expected_of_need(self) -> dict[str, float]:
        """Prior weights of a seed's health, as the heuristic weighs it: the first branches of a run have to grow somewhere."""
        from esper.controllers.senses import SEED_FEATURES

        known = HeuristicConfig()
        return dict(
            zip(SEED_FEATURES, (self.config.need * one for one in (known.variance, known.near_zero, known.correlation)), strict=True)
        )

    def _choose(self, posterior: Any, left: float) -> _Choice | None:
        """One decision by one draw, within ``left`` parameters; None where growing promises nothing."""
        lot = self._lot()
        affordable = self.arms.affordable(left)
        found = self.arms.best(posterior, posterior.draw(lot, 1)[0], affordable)
        if found is None or found.value <= 0.0:
            return None
        features = self.arms.features(found)
        x = self.arms.vector(features, posterior)
        chances = self.arms.chances(posterior, posterior.draw(lot, PROBABILITY_DRAWS), affordable, SHOWN_SITES)
        place, arm = self.places.seed(found.row), self.arms.arm(found)
        why = {
            "controller": self.config.name,
            "chosen": {"site": place[0], "seed": place[1], **arm},
            "features": features,
            "sampled": found.value,
            "expected": float(x @ posterior.mean),
            "uncertainty": posterior.spread(x),
            "probabilities": chances,
            "observations": self.known.n + self.own.n,
        }
        return _Choice(place, arm, why)

    def _lot(self) -> Any:
        """A separate generator for every choice, so that a checkpoint needs only their number."""
        import numpy as np

        text = "\x1f".join(map(str, (self.seed, CONTROLLER, self.config.name, self.draws)))
        self.draws += 1
        return np.random.default_rng(int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "big"))

    # --- checkpoints ---

    def state(self) -> dict[str, Any]:
        """JSON-able; floats survive JSON to the bit."""
        parts = {name: getattr(self, name).state() for name in _PARTS}
        return parts | {"known": self.known.state(), "own": self.own.state(), "draws": self.draws}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from ``state``; a memory that was read when this was built gives way to the one that the run began with."""
        from esper.controllers.posterior import Evidence

        for name in _PARTS:
            getattr(self, name).load_state(state[name])
        self.known, self.own = Evidence.from_state(state["known"]), Evidence.from_state(state["own"])
        self.draws = state["draws"]


_PARTS = ("places", "attempts", "health", "budget", "credit", "arms")


def _reward(evidence: Any, ended: Any) -> None:
    """Enter an ended life that a bandit had decided on."""
    features = ended.life.why.get("features")
    if isinstance(features, dict) and features:
        evidence.add({str(name): float(value) for name, value in features.items()}, ended.reward)
