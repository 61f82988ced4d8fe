"""The policy at work: it watches a run, asks its network at set times within what the shield allows, and answers for its predictions."""

from __future__ import annotations

import base64
import hashlib
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from esper.controllers.bandit import LOSS
from esper.controllers.base import command_id
from esper.controllers.bookkeeping import Attempts, Budget
from esper.controllers.heuristic import HeuristicConfig, HeuristicController
from esper.controllers.policy.choosing import Chooser, Chosen, Legal
from esper.controllers.policy.network import GERMINATE, WAIT
from esper.controllers.policy.shield import Shield, Trust
from esper.controllers.policy.situation import Watcher
from esper.controllers.policy.weights import Policy, unpacked
from esper.controllers.view import Seed, check_times
from esper.errors import UserError
from esper.grafting.config import CONFIGS as STRATEGIES
from esper.lifecycle.duration import parse
from esper.messages import CONTROLLER, Acknowledgement, Command, EmergencyStop, Germinate, Message, RunStarted, Selector, Transition

if TYPE_CHECKING:
    from esper.controllers.policy.config import PolicyConfig


class PolicyController:
    """Decides by a network until its predictions have been off for long; from then on the heuristic decides, behind the same shield."""

    def __init__(self, config: PolicyConfig, seed: int, policy: Policy) -> None:
        self.config, self.seed = config, seed
        self.attempts, self.shield = Attempts(), Shield(LOSS, config.rise)
        self.budget = Budget("", config.max_parameters, config.max_growth)
        self.asked: dict[Seed, str] = {}
        self.leaving: dict[str, Seed] = {}
        self.complaints: list[str] = []
        self.instead: HeuristicController | None = None
        self._wave, self._second = 0, ""
        self.because = ""
        self.draws = 0
        self.total = 0
        self._take(policy)

    def _take(self, policy: Policy) -> None:
        """Decide by this policy from now on, and pay branches as those were from which it has learnt."""
        config, learnt = self.config, policy.learnt
        self.policy, self.chooser = policy, Chooser(policy.network, config.temperature)
        self.watcher = Watcher(LOSS, learnt["rent"], learnt["trend"])
        self.trust = Trust(learnt["error"], config.ends, config.tolerance)

    # --- hearing ---

    def observe(self, message: Message) -> None:
        """Take note of messages that bear on what to do, and of lives that end."""
        self.attempts.observe(message)
        self.budget.observe(message)
        self.shield.observe(message)
        ended = self.watcher.observe(message)
        if isinstance(message, RunStarted):
            self._begin(message)
        elif isinstance(message, Acknowledgement) and message.status == "refused":
            self.leaving.pop(message.command_id, None)
        elif isinstance(message, Transition):
            self.leaving = {id: seed for id, seed in self.leaving.items() if seed != (message.site, message.seed)}
        if self.instead is not None:
            self.instead.observe(message)
        elif ended is not None and ended.life.why.get("controller") == self.config.name and "expected" in ended.life.why:
            self.trust.enter(float(ended.life.why["expected"]), ended.reward)
            self._judge()

    def _begin(self, started: RunStarted) -> None:
        """The run's sites and length. Raises UserError where the network knows nothing that could grow, or nothing ever would."""
        self.total = started.total_ticks
        self._started = replace(started, sites=[{key: value for key, value in site.items() if key != "stages"} for site in started.sites])
        self.attempts.rest_ticks = self.shield.calm = self._ticks(self.config.embargo)
        check_times(self.config.germinate_at, self.config.until, started)
        known, config = self.policy.network.words, self.config
        wanted = config.blueprints or known.blueprint
        there = {name for site in started.sites for name in site["blueprints"]}
        if not (fitting := [name for name in wanted if name in there]):
            raise UserError(
                f"controller.weights={config.weights} has learnt of {', '.join(wanted)}, which fits no site of this run (there: "
                f"{', '.join(sorted(there)) or 'nothing'}); name a policy that was learnt from runs with these blueprints."
            )
        self.budget.check(fitting)
        fits = [[name in fitting and name in site["blueprints"] for name in known.blueprint] for site in started.sites]
        self._fits = np.array(fits).reshape(len(started.sites), -1)
        costs = [[site["blueprints"].get(name, {"parameters": 0})["parameters"] for name in known.blueprint] for site in started.sites]
        self._costs = np.array(costs, float).reshape(self._fits.shape)
        self._second = self._second_choice(fitting)
        can = started.sites[0].get("objectives", []) if started.sites else []
        self._strategies = self._allowed("strategies", known.strategy, config.strategies, list(STRATEGIES))
        self._objectives = self._allowed("objectives", known.objective, config.objectives, can)

    def _second_choice(self, fitting: list[str]) -> str:
        """What the heuristic grows, if it decides: the run's own blueprint (empty) where allowed and affordable, else the smallest."""
        sites = self._started.sites
        own = {site.get("blueprint", "") for site in sites}
        costs = {name: min(self.budget.cost(site["name"], name) for site in sites if name in site["blueprints"]) for name in fitting}
        if any(costs.get(name, self.budget.limit + 1) <= self.budget.limit for name in own):
            return ""
        return min(costs, key=lambda name: (costs[name], name))

    def _allowed(self, key: str, known: tuple[str, ...], wanted: list[str], can: list[str]) -> np.ndarray:
        """Which of the ``known`` words are wanted and can be, bool; every one can be where nothing is said of it."""
        allowed = np.array([(not wanted or name in wanted) and (not can or name in can) for name in known])
        if not allowed.any():
            words, run = ", ".join(wanted or known), ", ".join(can)
            raise UserError(f"controller.weights={self.config.weights} has learnt of the {key} {words}, and this run can have {run} alone.")
        return allowed

    def _ticks(self, text: str) -> int:
        return parse(text).ticks(self.total, 0)

    # --- deciding ---

    def decide(self, tick: int) -> list[Command]:
        """What the network chooses, one action after another until it waits; or what the heuristic does in its stead."""
        if not self.total:
            return []
        if self.instead is not None:
            return self._by_heuristic(tick)
        since = tick - self._ticks(self.config.germinate_at)
        if since < 0 or since % max(1, self._ticks(self.config.every)):
            return []
        self.watcher.look()
        commands: list[Command] = []
        while len(commands) < self.config.count:
            command = self._next(tick, len(commands))
            if command is None:
                break
            commands.append(command)
        return commands

    def _next(self, tick: int, n: int) -> Command | None:
        """One more action at this tick; None where the network waits, or may do nothing else."""
        watcher = self.watcher
        self.asked = {seed: self.asked[seed] for seed in self.attempts.open}
        free = watcher.places.free(self.attempts.unavailable(tick)) & watcher.senses.known
        situation = watcher.situation(tick, free, self.asked, list(self.leaving.values()))
        legal = self._legal(tick, situation.branches)
        if not (legal.growth and (situation.open_sites() & legal.blueprints.any(1)).any()) and not legal.stops.any():
            return None
        chosen = self.chooser.choose(situation, legal, watcher.places.names, self._lot())
        if chosen.kind == WAIT:
            return None
        if chosen.kind == GERMINATE:
            return self._germinate(tick, n, chosen)
        return self._stop(tick, n, chosen, situation.branches[chosen.branch])

    def _legal(self, tick: int, branches: list[Seed]) -> Legal:
        """What shield, limits and budgets allow."""
        config = self.config
        active = len(self.watcher.places.active | set(self.asked))
        growth = tick <= self._ticks(config.until) and active < config.max_active and not self.shield.against_growth(tick)
        growth = growth and not (config.most and self.attempts.applied + len(self.asked) >= config.most)
        left = self.budget.limit - self.budget.used - sum(self.budget.cost(site, name) for (site, _), name in self.asked.items())
        asked, lives = list(self.leaving.values()), self.watcher.credit.lives
        stops = np.array([not self.shield.against_stop(lives[seed], asked) for seed in branches], bool)
        return Legal(growth, self._fits & (self._costs <= left), self._strategies, self._objectives, stops)

    def _why(self, chosen: Chosen, what: dict[str, Any]) -> dict[str, Any]:
        return {
            "controller": self.config.name,
            "chosen": what,
            "features": chosen.features,
            "probabilities": chosen.probabilities,
            "expected": chosen.expected,
            "weights": self.policy.digest,
        }

    def _germinate(self, tick: int, n: int, chosen: Chosen) -> Germinate:
        site, seed = self.watcher.places.seed(chosen.seed)
        blueprint, strategy, objective = chosen.words
        what = {"action": "germinate", "site": site, "seed": seed, "blueprint": blueprint, "strategy": strategy, "objective": objective}
        command = Germinate(
            id=command_id(tick, n),
            site=site,
            seed=seed,
            blueprint=blueprint,
            strategy=strategy,
            objective=objective,
            why=self._why(chosen, what),
        )
        self.attempts.sent(command)
        self.asked[site, seed] = blueprint
        return command

    def _stop(self, tick: int, n: int, chosen: Chosen, seed: Seed) -> EmergencyStop:
        """Stopped, not moved: a stage may have a least age."""
        why = self._why(chosen, {"action": "stop", "site": seed[0], "seed": seed[1]})
        id = command_id(tick, n)
        self.leaving[id] = seed
        return EmergencyStop(id=id, select=Selector(site=seed[0], seeds=[seed[1]]), reason="the policy expects no more of it", why=why)

    def _lot(self) -> np.random.Generator:
        """A separate generator for every choice, so that a checkpoint needs only their number."""
        text = "\x1f".join(map(str, (self.seed, CONTROLLER, self.config.name, self.draws)))
        self.draws += 1
        return np.random.default_rng(int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "big"))

    # --- falling back ---

    def _judge(self) -> None:
        """Let the heuristic decide from now on, if the network's predictions have been off for long."""
        self.because = self.trust.lost()
        if self.because:
            self._wave = self._left()
            self.instead = self._heuristic()
            watched = self.watcher
            mine: dict[str, Any] = {"view": watched.places, "attempts": self.attempts, "health": watched.health, "budget": self.budget}
            known = {name: part.state() for name, part in mine.items()}
            self.instead.load_state(known | {"plateau": self.instead.plateau.state(), "first_done": False, "goal": 0})
            self.instead.observe(self._started)
            self.complaints.append(f"controller=policy decides no more: {self.because}. The heuristic decides in its stead.")

    def _left(self) -> int:
        """Germinations that the heuristic may make in one wave."""
        left = self.config.most - self.attempts.applied - len(self.attempts.open)
        return min(self.config.count, max(0, left)) if self.config.most else self.config.count

    def _heuristic(self) -> HeuristicController:
        """A heuristic with this policy's limits, which knows of no objectives; with ``most`` it starts one wave."""
        config = self.config
        return HeuristicConfig(
            blueprint=self._second,
            strategy=config.strategies[0] if config.strategies else "",
            germinate_at=config.germinate_at,
            plateau="" if config.most else config.every,
            until=config.until,
            count=self._wave,
            max_active=config.max_active,
            max_parameters=config.max_parameters,
            max_growth=config.max_growth,
            embargo=config.embargo,
        ).build(self.seed)

    def _by_heuristic(self, tick: int) -> list[Command]:
        assert self.instead is not None
        if self.shield.against_growth(tick):
            return []
        commands = self.instead.decide(tick)
        said = {"instead of": self.config.name, "because": self.because}
        return [replace(command, why=command.why | said) for command in commands if isinstance(command, Germinate)]

    # --- checkpoints ---

    def state(self) -> dict[str, Any]:
        """JSON-able, the weights included: a file that has changed since changes no run that goes on."""
        parts = {name: getattr(self, name).state() for name in _PARTS}
        return parts | {
            "weights": base64.b64encode(self.policy.data).decode(),
            "asked": [[*seed, name] for seed, name in self.asked.items()],
            "leaving": {id: list(seed) for id, seed in self.leaving.items()},
            "draws": self.draws,
            "because": self.because,
            "instead": None if self.instead is None else {"wave": self._wave, "blueprint": self._second, "heuristic": self.instead.state()},
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from ``state``, before the run's start is heard again."""
        data = base64.b64decode(state["weights"])
        if data != self.policy.data:
            self._take(unpacked(data, "The policy in the checkpoint"))
        for name in _PARTS:
            getattr(self, name).load_state(state[name])
        self.asked = {(site, seed): name for site, seed, name in state["asked"]}
        self.leaving = {id: (site, seed) for id, (site, seed) in state["leaving"].items()}
        self.draws, self.because = state["draws"], state["because"]
        if state["instead"] is not None:
            self._wave, self._second = state["instead"]["wave"], state["instead"]["blueprint"]
            self.instead = self._heuristic()
            self.instead.load_state(state["instead"]["heuristic"])


_PARTS = ("attempts", "budget", "shield", "watcher", "trust")
