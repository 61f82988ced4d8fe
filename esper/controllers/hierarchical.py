"""``hierarchical``: local controllers of groups of sites propose, and an allocator grants under budgets, once a round."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Any

from esper.controllers.base import command_id
from esper.controllers.view import Seed, check_duration
from esper.errors import UserError
from esper.lifecycle.duration import parse
from esper.lifecycle.stages import Stage
from esper.messages import (
    Acknowledgement,
    Command,
    Germinate,
    Message,
    PauseGrafting,
    Proposal,
    ResumeGrafting,
    RunStarted,
    Selector,
    Transition,
)
from esper.processes import ControllerPlace
from esper.setting_fields import setting

LEAST = 1e-3
"""Share of the expected gain below which no history of a group pushes the worth of its proposals."""


@dataclass
class HierarchicalConfig(ControllerPlace):
    """The local controllers, the budgets under which they share, and how the allocator weighs them."""

    name: str = "hierarchical"
    local: str = setting("heuristic", help="the controller of every group: any option of this group but hierarchical")
    local_settings: dict[str, Any] = setting({}, help="its settings, for example {count: 2, germinate_at: 5%}")
    groups: list[str] = setting([], help="globs over sites, one a group; a site that none matches is a group of its own")
    remote: list[str] = setting([], help="groups whose local controller is a process of its own: esper control <folder> --group NAME")
    round: str = setting("1%", unit="duration", help="time between two allocations")
    silence: str = setting("5%", unit="duration", help="a remote local controller that says nothing for so long is dead")
    max_parameters: int = setting(0, low=0, help="most parameters that all branches may add; 0: no limit")
    max_growth: float = setting(0.0, low=0.0, unit="hosts", help="the same as a multiple of the host's; 0: no limit")
    max_macs: int = setting(0, low=0, help="most MACs that all branches may add to the forward pass of a sample; 0: no limit")
    max_memory_mb: float = setting(0.0, low=0.0, unit="MB", help="most memory of weights, gradients and moments; 0: no limit")
    most: int = setting(0, low=0, unit="seeds", help="germinations of the whole run, at most; 0: no limit")
    max_active: int = setting(8, low=1, unit="seeds", help="most seeds between GERMINATED and FINE_TUNING at a time")
    max_risk: float = setting(0.0, low=0.0, unit="seeds", help="most seeds under way that are expected to be lost; 0: no limit")
    fairness: float = setting(0.25, low=0.0, help="how much more a proposal is worth for each round that its group went without")
    patience: int = setting(8, low=1, unit="rounds", help="rounds after which a group's proposal comes before all others")
    expected: float = setting(0.02, low=1e-6, help="gain expected of a group of which nothing is known, as a share of the loss")

    def build(self, seed: int) -> HierarchicalController:
        """The controller, with a local one for every group when the run starts.

        Raises:
            UserError: an unknown local controller, a setting that it does not have, a duration in epochs.
        """
        from esper.controllers import CONFIGS

        for text in (self.round, self.silence):
            check_duration(text)
        kinds = {name: kind for name, kind in CONFIGS.items() if name != self.name}
        if self.local not in kinds:
            raise UserError(f"controller.local={self.local} is not accepted; it takes {', '.join(kinds)}.")
        known = [one.name for one in fields(kinds[self.local]) if one.name not in ("name", "process", "timing", "deadline_s")]
        for key in self.local_settings:
            if key not in known:
                raise UserError(f"controller.local_settings.{key} is no setting of controller={self.local}; there are {', '.join(known)}.")
        self.local_controller("any", seed)
        return HierarchicalController(self, seed)

    def local_controller(self, group: str, seed: int) -> Any:
        """The local controller of a group; each draws from generators of its own."""
        from esper.controllers import CONFIGS

        text = "\x1f".join(map(str, (seed, self.name, group)))
        own = int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big")
        return CONFIGS[self.local](**self.local_settings).build(own)


class HierarchicalController:
    """Passes to each local controller what concerns its group, collects what they want, and grants it as far as the budgets reach."""

    def __init__(self, config: HierarchicalConfig, seed: int) -> None:
        from esper.controllers.bandit import LOSS
        from esper.controllers.credit import Credit
        from esper.controllers.groups import Group
        from esper.controllers.usage import Usage, limits

        self.config, self.seed = config, seed
        self.groups: dict[str, Group] = {}
        budgets = (config.max_parameters, config.max_macs, config.max_memory_mb, config.max_active, config.max_risk)
        self.usage = Usage(limits(*budgets))
        self.credit = Credit(LOSS, rent=0.0, trend=0.5)
        self.answers: list[Acknowledgement] = []
        self.complaints: list[str] = []
        self.total = 0
        self._of_site: dict[str, str] = {}
        self._sent: dict[str, tuple[str, str]] = {}  # the trainer's id → the group and its own id
        self._out: list[tuple[str, Command]] = []
        self._saved: dict[str, Any] = {}

    # --- hearing ---

    def observe(self, message: Message) -> None:
        """Take note of a message, and pass it to the group that it concerns."""
        if isinstance(message, RunStarted):
            self._begin(message)
        self.usage.observe(message)
        ended = self.credit.observe(message)
        if ended is not None:
            self.usage.learn(ended)
            if (name := self._of_site.get(ended.life.site)) is not None:
                self.groups[name].gains += ended.gain
                self.groups[name].ends += 1
        if isinstance(message, RunStarted):
            self.usage.limit_growth(self.config.max_growth)
        elif isinstance(message, Proposal):
            self._take(message)
        elif isinstance(message, Acknowledgement):
            self._acknowledged(message)
        elif isinstance(message, Transition) and message.target == Stage.GRAFTING:
            self._hold([(message.site, message.seed)])
        for group in self._hearing(message):
            if group.local is not None and (mine := group.view(message)) is not None:
                group.local.observe(mine)

    def _hearing(self, message: Message) -> list[Any]:
        site = getattr(message, "site", "")
        return [self.groups[self._of_site[site]]] if site in self._of_site else list(self.groups.values())

    def _begin(self, started: RunStarted) -> None:
        from esper.controllers.groups import Group, contained, divide

        self.total = started.total_ticks
        divided = divide([site["name"] for site in started.sites], self.config.groups)
        for name in self.config.remote:
            if name not in divided:
                raise UserError(f"controller.remote names '{name}', which is no group; there are: {', '.join(divided)}.")
        self._of_site = {site: name for name, sites in divided.items() for site in sites}
        for name, sites in divided.items():
            here = name not in self.config.remote
            self.groups[name] = Group(name, sites, contained(self.config.local_controller(name, self.seed)) if here else None)
            self.groups[name].heard = started.tick
            if name in self._saved:
                self.groups[name].load_state(self._saved.pop(name))

    def _acknowledged(self, message: Acknowledgement) -> None:
        if message.status == "delivered":
            return
        group, own = self._sent.pop(message.command_id, ("", ""))
        if own:
            self._answer(group, own, message.status, message.reason, message.tick)

    def _answer(self, group: str, own: str, status: str, reason: str, tick: int) -> None:
        """Tell a local controller the end of its proposal, by the id that it gave it."""
        said = Acknowledgement(command_id=own, status=status, reason=reason, tick=tick)
        local = self.groups[group].local
        if local is not None:
            local.observe(said)
        else:
            self.answers.append(said)

    def _take(self, proposal: Proposal) -> None:
        """Sort what a local controller wants: growth waits for the allocator, the rest passes if it concerns its own seeds."""
        from esper.controllers.groups import Pending, confined

        group = self.groups.get(proposal.group)
        if group is None:
            return
        group.heard = max(group.heard, proposal.tick)
        for command in proposal.commands:
            if group.local is None and not group.is_new(command.id):
                continue
            mine = confined(command, group.sites)
            if mine is None:
                reason = f"it concerns seeds that are not in the group '{group.name}'"
                self._answer(group.name, command.id, "refused", reason, proposal.tick)
                continue
            pending = Pending(command.id, mine)
            if pending.germinations():
                group.pending.append(pending)
            else:
                self._out.append((group.name, mine))

    # --- deciding ---

    def decide(self, tick: int) -> list[Command]:
        """What passes, what is granted where a round ends, and what holds the seeds of local controllers that have died."""
        if not self.total:
            return []
        for group in self.groups.values():
            if group.local is not None:
                self._take(Proposal(group=group.name, tick=tick, commands=group.local.decide(tick)))
        self._watch(tick)
        if tick % max(1, self._ticks(self.config.round)) == 0:
            self._allocate(tick)
        commands = []
        for n, (name, command) in enumerate(self._out):
            id = command_id(tick, n)
            if name:
                self._sent[id] = (name, command.id)
            sent = replace(command, id=id)
            self.usage.sent(id, _germinations(sent))
            commands.append(sent)
        self._out = []
        return commands

    def _ticks(self, text: str) -> int:
        return parse(text).ticks(self.total, 0)

    def _allocate(self, tick: int) -> None:
        """Grant the proposals that are worth most for what they cost, those of a group first that has waited too long."""
        import numpy as np

        from esper.controllers.allocation import allocate
        from esper.controllers.usage import SEEDS

        self._refuse_impossible(tick)
        wanting = [group for group in self.groups.values() if group.pending]
        left, granted = self.usage.left(), set()
        if self.config.most:
            left[SEEDS] = min(left[SEEDS], self.config.most - self.usage.germinated)
        for group in sorted(wanting, key=lambda one: -one.waited):
            if group.waited < self.config.patience:
                break
            cost = group.pending[0].cost
            if (cost > left + 1e-9).any():
                wanting = []  # what comes free is kept for it
                break
            self._grant(group, [0])
            granted.add(group.name)
            left = left - cost
        offers = [(group, place) for group in wanting for place in range(len(group.pending))]
        if offers:
            usual = _usual_need(group.pending[place] for group, place in offers)
            value = np.array([self._worth(group, group.pending[place], usual) for group, place in offers])
            chosen = allocate(value, np.array([group.pending[place].cost for group, place in offers]), left)
            places: dict[str, list[int]] = {}
            for number in np.flatnonzero(chosen).tolist():
                places.setdefault(offers[number][0].name, []).append(offers[number][1])
            for name, some in places.items():
                self._grant(self.groups[name], some)
            granted |= places.keys()
        for group in self.groups.values():
            group.waited = group.waited + 1 if group.pending and group.name not in granted else 0

    def _worth(self, group: Any, pending: Any, usual: float) -> float:
        """The gain that is expected of a proposal: what the local controller says of it, or what its group's branches have gained.

        A local controller that knows no gain may say how much its seeds need a branch; beside the ``usual`` need of all that is proposed
        it scales what the group's branches have gained.
        """
        worth = 0.0
        for one in pending.germinations():
            said = one.why.get("expected")
            mean = (self.config.expected + group.gains) / (1.0 + group.ends)
            if isinstance(need := one.why.get("need"), float) and usual > 0.0:
                mean *= max(0.0, need) / usual
            known = said * self.credit.cost(one.site, one.blueprint) if isinstance(said, float) else mean
            worth += max(LEAST * self.config.expected, known)
        return float(worth * (1.0 + self.config.fairness * group.waited))

    def _grant(self, group: Any, places: list[int]) -> None:
        self._out += [(group.name, group.pending[place].command) for place in places]
        group.pending = [one for place, one in enumerate(group.pending) if place not in places]

    def _refuse_impossible(self, tick: int) -> None:
        """Refuse what would overdraw a budget even if nothing else grew, and a seed that is asked for twice or grows already."""
        wanted: set[Seed] = set()
        for group in self.groups.values():
            for pending in list(group.pending):
                seeds = [(one.site, one.seed) for one in pending.germinations()]
                if len({*seeds} - wanted - self.usage.growing.keys()) < len(seeds):
                    group.pending.remove(pending)
                    self._answer(group.name, pending.id, "refused", "a seed of it is asked for already, or grows", tick)
                    continue
                wanted.update(seeds)
                pending.cost = sum(self.usage.cost(one) for one in pending.germinations())
                if over := self.usage.never(pending.cost):
                    group.pending.remove(pending)
                    self._answer(group.name, pending.id, "refused", f"the budget of {over} has no room for it, now or later", tick)

    # --- local controllers that die ---

    def _watch(self, tick: int) -> None:
        """Notice local controllers that say nothing any more, hold their seeds, and let go when they are back."""
        silence = self._ticks(self.config.silence)
        for group in self.groups.values():
            if group.local is not None:
                self.complaints += group.local.said()
            dead = group.local.dismissed if group.local is not None else tick - group.heard > silence
            if dead and not group.dead:
                group.dead = True
                self.complaints.append(f"the local controller of '{group.name}' is dead; its seeds are held, and nothing more grows there")
                seeds = [seed for seed in self.credit.lives if seed[0] in group.sites and self.credit.lives[seed].blending >= 0]
                self._hold(seeds)
            elif group.dead and not dead:
                group.dead = False
                self.complaints.append(f"the local controller of '{group.name}' is back; its seeds go on")
                self._out += [("", _of_seed(ResumeGrafting, seed)) for seed in group.held if seed in self.credit.lives]
                group.held = []
            if group.dead:
                for pending in group.pending:
                    self._answer(group.name, pending.id, "refused", "its local controller is dead", tick)
                group.pending = []

    def _hold(self, seeds: list[Seed]) -> None:
        """Hold the alpha of GRAFTING seeds whose local controller is dead; the trainer ends what is held too long."""
        for seed in seeds:
            group = self.groups.get(self._of_site.get(seed[0], ""))
            if group is not None and group.dead and seed not in group.held:
                group.held.append(seed)
                self._out.append(("", _of_seed(PauseGrafting, seed)))

    # --- checkpoints ---

    def state(self) -> dict[str, Any]:
        """JSON-able."""
        from esper.controllers.groups import written

        parts = {"usage": self.usage.state(), "credit": self.credit.state(), "sent": {id: list(whose) for id, whose in self._sent.items()}}
        out = [[name, written(command)] for name, command in self._out]
        return parts | {"out": out, "groups": {name: group.state() for name, group in self.groups.items()} | self._saved}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from ``state``; the groups come again with RunStarted."""
        from esper.controllers.groups import read

        self._out = [(name, read(text)) for name, text in state["out"]]
        self.usage.load_state(state["usage"])
        self.credit.load_state(state["credit"])
        self._sent = {id: (group, own) for id, (group, own) in state["sent"].items()}
        self._saved = dict(state["groups"])


def _germinations(command: Command) -> list[Germinate]:
    from esper.controllers.groups import germinations

    return germinations(command)


def _of_seed(kind: Any, seed: Seed) -> Command:
    made: Command = kind(id="", select=Selector(site=seed[0], seeds=[seed[1]], stage=int(Stage.GRAFTING)))
    return made


def _usual_need(proposals: Iterable[Any]) -> float:
    """The mean of the needs that the proposals' germinations name; 0 where none does."""
    needs = [one.why["need"] for pending in proposals for one in pending.germinations() if isinstance(one.why.get("need"), float)]
    return max(0.0, sum(needs) / len(needs)) if needs else 0.0
