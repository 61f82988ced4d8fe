"""The allocator: budgets, fairness, confinement, dead local controllers; no conflict, starvation or deadlock whatever happens."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from esper.controllers import CONFIGS
from esper.controllers.hierarchical import HierarchicalConfig
from esper.controllers.usage import BUDGETS
from esper.errors import UserError
from esper.lifecycle.stages import Stage
from esper.messages import (
    Acknowledgement,
    Cancel,
    EmergencyStop,
    Germinate,
    PauseGrafting,
    Proposal,
    ResumeGrafting,
    RunStarted,
    Selector,
    Transition,
)
from tests.controllers.policies import network, saved
from tests.examples import examples

SITES = ("a", "b", "c")
SEEDS = 3
BLUEPRINTS = {"small": {"parameters": 10, "macs": 20}, "mlp": {"parameters": 100, "macs": 50}, "huge": {"parameters": 10**6, "macs": 1}}


def started(total: int = 10_000) -> RunStarted:
    card = {"seeds": SEEDS, "blueprint": "mlp", "blueprints": BLUEPRINTS, "host_parameters": 1000, "telemetry_every": 1, "width": 8}
    return RunStarted(tick=0, total_ticks=total, sites=[card | {"name": name} for name in SITES])


def remote(**changed: Any) -> Any:
    """An allocator whose local controllers all speak by messages."""
    given = {"remote": list(SITES), "round": "10step", "silence": "60step", "max_parameters": 250, "max_active": 3, "patience": 3}
    return HierarchicalConfig(**(given | changed)).build(0)


class Engine:
    """Carries out what the allocator commands, and keeps every seed's stage."""

    def __init__(self, controller: Any) -> None:
        self.controller = controller
        self.stages = {(site, seed): Stage.DORMANT for site in SITES for seed in range(SEEDS)}
        self.blueprints: dict[tuple[str, int], str] = {}
        self.paused: set[tuple[str, int]] = set()
        self.tick = 0
        self.kept = 0
        self.asked: dict[str, int] = {}
        self.ended: dict[str, tuple[str, str]] = {}
        self.alive = dict.fromkeys(SITES, True)
        controller.observe(started())

    def propose(self, group: str, *commands: Any) -> None:
        self.asked |= {command.id: self.tick for command in commands}
        self.controller.observe(Proposal(group=group, tick=self.tick, commands=list(commands)))

    def move(self, site: str, seed: int, target: Stage) -> None:
        self.stages[site, seed] = target
        self.controller.observe(
            Transition(
                tick=self.tick, site=site, seed=seed, branch=0, source=0, target=target, cause="", blueprint=self.blueprints[site, seed]
            )
        )

    def run(self, ticks: int) -> None:
        """Ticks with a sign of life from every local controller that lives."""
        for _ in range(ticks):
            self.tick += 1
            for group, alive in self.alive.items():
                if alive:
                    self.controller.observe(Proposal(group=group, tick=self.tick))
            commands = self.controller.decide(self.tick)
            assert len({command.id for command in commands}) == len(commands)
            for command in commands:
                self._apply(command)
            for said in self.controller.answers:
                assert said.command_id in self.asked and said.command_id not in self.ended, "answered once, and only what was asked"
                self.ended[said.command_id] = (said.status, said.reason)
            self.controller.answers.clear()

    def _apply(self, command: Any) -> None:
        status, reason = "applied", ""
        if isinstance(command, Germinate):
            seed = (command.site, command.seed)
            assert seed[1] < SEEDS
            if self.stages[seed] is not Stage.DORMANT:
                status, reason = "refused", "it is not DORMANT"
            else:
                self.blueprints[seed] = command.blueprint or "mlp"
                self.move(*seed, Stage.GERMINATED)
        elif isinstance(command, PauseGrafting | ResumeGrafting):
            for seed in command.select.seeds:
                (self.paused.add if isinstance(command, PauseGrafting) else self.paused.discard)((command.select.site, seed))
        self.controller.observe(Acknowledgement(command_id=command.id, status=status, reason=reason, tick=self.tick))

    def growing(self) -> list[tuple[str, int]]:
        return [seed for seed, stage in self.stages.items() if Stage.GERMINATED <= stage < Stage.FOSSILIZED]

    def end(self, seed: tuple[str, int], kept: bool) -> None:
        self.paused.discard(seed)
        if kept:
            self.kept += BLUEPRINTS[self.blueprints[seed]]["parameters"]
            self.move(*seed, Stage.FOSSILIZED)
        else:
            self.move(*seed, Stage.CULLED)
            self.move(*seed, Stage.DORMANT)

    def parameters(self) -> int:
        return self.kept + sum(BLUEPRINTS[self.blueprints[seed]]["parameters"] for seed in self.growing())


def germinate(id: str, site: str, seed: int = 0, blueprint: str = "", **why: Any) -> Germinate:
    return Germinate(id=id, site=site, seed=seed, blueprint=blueprint, why=why)


def test_it_grants_what_gains_most_for_its_cost_within_every_budget():
    engine = Engine(remote(max_active=2, max_parameters=120))
    for number, (site, blueprint, gain) in enumerate([("a", "mlp", 0.1), ("b", "small", 0.3), ("c", "mlp", 0.5)]):
        cost = engine.controller.credit.cost(site, blueprint)
        engine.propose(site, germinate(f"{number}", site, 0, blueprint, expected=gain / cost))
    engine.run(10)
    assert engine.growing() == [("b", 0), ("c", 0)], "0.8 together, of 110 parameters and two seeds"


@pytest.mark.parametrize(
    ("budget", "reached"),
    [({"max_macs": 70}, 2), ({"max_memory_mb": 0.0018}, 2), ({"max_risk": 1.0}, 2), ({"max_growth": 0.2}, 2), ({"max_active": 1}, 1)],
)
def test_each_budget_limits_what_grows_at_once(budget: dict[str, Any], reached: int):
    engine = Engine(remote(**({"max_parameters": 0, "max_active": 9} | budget)))
    blueprints = {"max_macs": ["mlp", "small", "mlp"], "max_memory_mb": ["mlp", "small", "mlp"]}.get(next(iter(budget)), ["mlp"] * 3)
    for site, blueprint in zip(SITES, blueprints, strict=True):
        engine.propose(site, germinate(site, site, 0, blueprint))
    engine.run(30)
    assert len(engine.growing()) == reached, BUDGETS


def test_what_could_never_fit_is_refused_at_once_with_the_reason():
    engine = Engine(remote())
    engine.propose("a", germinate("1", "a", 0, "huge"))
    engine.run(10)
    assert engine.ended["1"] == ("refused", "the budget of parameters has no room for it, now or later")


def test_a_seed_that_is_asked_for_twice_is_granted_once_and_stays_on_the_books():
    engine = Engine(remote(max_active=2))
    engine.propose("a", germinate("1", "a", 0, "small"), germinate("2", "a", 0, "small"), germinate("3", "a", 1, "small"))
    engine.propose("b", germinate("4", "b", 0, "small"))
    engine.run(40)
    assert engine.ended["2"] == ("refused", "a seed of it is asked for already, or grows")
    assert len(engine.growing()) == 2 == len(engine.controller.usage.growing)


def test_layers_take_turns_although_one_promises_more():
    engine = Engine(remote(max_active=1, max_parameters=0, patience=50, fairness=1.0))
    seen = []
    for number in range(60):
        for site in SITES:
            if not any(one.command.site == site for one in engine.controller.groups[site].pending):
                gain = {"a": 0.2, "b": 0.1, "c": 0.05}[site]
                engine.propose(site, germinate(f"{site}{number}", site, 0, "mlp", expected=gain))
        engine.run(10)
        for seed in engine.growing():
            seen.append(seed[0])
            engine.end(seed, kept=False)
    assert min(seen.count(site) for site in SITES) >= 8 and seen.count("a") > seen.count("c"), seen


def test_a_large_proposal_is_not_starved_by_small_ones_that_always_fit():
    engine = Engine(remote(max_parameters=105, max_active=9, fairness=0.0, patience=3))
    engine.propose("a", germinate("large", "a", 0, "mlp", expected=0.01))
    for number in range(12):
        for site in ("b", "c"):
            engine.propose(site, *[germinate(f"{site}{number}{seed}", site, seed, "small", expected=1.0) for seed in range(SEEDS)])
        engine.run(10)
        for seed in engine.growing():
            if seed[0] != "a":
                engine.end(seed, kept=False)
    assert engine.stages["a", 0] is Stage.GERMINATED


def test_a_local_controller_commands_its_own_group_alone():
    engine = Engine(remote(groups=["[ab]"], remote=["[ab]", "c"]))
    engine.alive = {"[ab]": True, "c": True}
    everything = Cancel(id="all", select=Selector(site="*"))
    engine.propose("[ab]", germinate("1", "c"), everything, EmergencyStop(id="stop", select=Selector(site="c")))
    commands: list[Any] = []
    apply = engine._apply
    engine._apply = lambda command: (commands.append(command), apply(command))  # type: ignore[method-assign]
    engine.run(10)
    assert engine.ended["1"] == ("refused", "it concerns seeds that are not in the group '[ab]'") == engine.ended["stop"]
    (passed,) = commands
    assert [part.select.site for part in passed.commands] == ["a", "b"]


def test_a_dead_local_controller_is_noticed_and_its_seeds_are_held_until_it_is_back():
    engine = Engine(remote())
    engine.propose("a", germinate("1", "a", 0), germinate("2", "a", 1))
    engine.run(10)
    engine.move("a", 0, Stage.GRAFTING)
    engine.alive["a"] = False
    engine.propose("b", germinate("3", "b", 0, "small"))
    engine.run(61)
    assert engine.paused == {("a", 0)} and "the local controller of 'a' is dead" in engine.controller.complaints[-1]
    engine.move("a", 1, Stage.GRAFTING)
    engine.run(1)
    assert engine.paused == {("a", 0), ("a", 1)}, "one that is blended later is held too"
    assert engine.stages["b", 0] is Stage.GERMINATED, "the others go on"
    engine.alive["a"] = True
    engine.run(1)
    assert engine.paused == set() and "is back" in engine.controller.complaints[-1]
    engine.propose("a", germinate("4", "a", 2, "small"))
    engine.end(("a", 0), kept=False)
    engine.run(20)
    assert engine.stages["a", 2] is Stage.GERMINATED


def test_it_goes_on_from_json_to_the_same_decisions():
    def begun() -> Engine:
        engine = Engine(remote())
        for number, site in enumerate(SITES):
            engine.propose(site, *[germinate(f"{site}{seed}", site, seed, ("mlp", "small")[seed % 2]) for seed in range(number + 1)])
        engine.run(15)
        return engine

    whole, other = begun(), begun()
    again = remote()
    again.load_state(json.loads(json.dumps(other.controller.state())))
    again.observe(started())
    other.controller = again
    for engine in (whole, other):
        for seed in engine.growing():
            engine.end(seed, kept=seed[0] == "a")
        engine.run(40)
    assert whole.stages == other.stages and whole.ended == other.ended
    assert json.dumps(whole.controller.state()) == json.dumps(other.controller.state())


@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in ("hierarchical", "none")])
def test_any_controller_can_be_the_local_one(run, name, tmp_path):
    script = [{"at": "5%", "command": "germinate", "site": "*", "count": 2}]
    own = {
        "scheduled": {"script": script},
        "random": {"count": 1, "earliest": "5%", "latest": "10%"},
        "heuristic": {"germinate_at": "5%", "count": 2},
        "bandit": {"germinate_at": "5%"},
        "probe": {"germinate_at": "5%", "candidates": 2, "keep": 1},
        "policy": {"germinate_at": "5%", "weights": saved(tmp_path, network((0.0, 50.0, -50.0)))},
    }[name]
    ran = run(HierarchicalConfig(local=name, local_settings=own, max_active=3).build(0)).start().until(60)
    germinated = [seed for seeds in ran.germinated.values() for seed in seeds]
    assert {site for site, _ in germinated} == {"fc1", "fc2"}
    assert 2 <= sum(stage == Stage.GERMINATED for stage in ran.stages.values()) <= 3 or name == "probe", "its losers have gone"
    state = json.loads(json.dumps(ran.runner.state()))
    again = run(HierarchicalConfig(local=name, local_settings=own, max_active=3).build(0), "again")
    again.runner.load_state(state)
    again.start(60)
    again.runner.hear()
    assert json.loads(json.dumps(again.runner.state())) == state


def test_an_exception_of_one_local_controller_costs_the_others_nothing(run, monkeypatch):
    from esper.controllers.heuristic import HeuristicController

    decide = HeuristicController.decide
    monkeypatch.setattr(HeuristicController, "decide", lambda self, tick: decide(self, tick) if "fc1" in self.view.sites else [][0])
    ran = run(HierarchicalConfig(local_settings={"germinate_at": "5%"}).build(0)).start().until(40)
    assert {site for seeds in ran.germinated.values() for site, _ in seeds} == {"fc1"}
    assert ran.runner.controller.groups["fc2"].dead


@pytest.mark.parametrize(
    ("settings_", "text"),
    [
        ({"local": "hierarchical"}, "controller.local=hierarchical is not accepted"),
        ({"local_settings": {"cuont": 1}}, "controller.local_settings.cuont is no setting of controller=heuristic"),
        ({"round": "1epoch"}, "cannot see epochs"),
    ],
)
def test_settings_that_mean_nothing_are_refused_when_it_is_built(settings_, text):
    with pytest.raises(UserError, match=text):
        HierarchicalConfig(**settings_).build(0)


@pytest.mark.parametrize(
    ("settings_", "text"),
    [({"groups": ["layers.*"]}, "matches no further site"), ({"remote": ["fc9"]}, "'fc9', which is no group")],
)
def test_groups_that_are_not_there_end_the_run_at_its_start(run, settings_, text):
    with pytest.raises(UserError, match=text):
        run(HierarchicalConfig(**settings_).build(0)).start().until(1)


class AnyHistory(RuleBasedStateMachine):
    """Local controllers that ask for anything and die at any time, branches that end as they like."""

    def __init__(self) -> None:
        super().__init__()
        self.engine = Engine(remote(max_parameters=250, max_active=3, max_macs=130))
        self.count = 0

    @rule(
        group=st.sampled_from(SITES),
        site=st.sampled_from(SITES),
        seed=st.integers(0, SEEDS - 1),
        blueprint=st.sampled_from([*BLUEPRINTS, ""]),
    )
    def ask(self, group: str, site: str, seed: int, blueprint: str) -> None:
        self.count += 1
        self.engine.propose(group, germinate(str(self.count), site, seed, blueprint))

    @rule(ticks=st.integers(1, 30))
    def pass_time(self, ticks: int) -> None:
        self.engine.run(ticks)

    @precondition(lambda self: self.engine.growing())
    @rule(kept=st.booleans(), data=st.data())
    def end(self, kept: bool, data: Any) -> None:
        self.engine.end(data.draw(st.sampled_from(self.engine.growing())), kept)

    @precondition(lambda self: self.engine.growing())
    @rule(data=st.data())
    def blend(self, data: Any) -> None:
        seed = data.draw(st.sampled_from(self.engine.growing()))
        if self.engine.stages[seed] is Stage.GERMINATED:
            self.engine.move(*seed, Stage.GRAFTING)

    @rule(group=st.sampled_from(SITES), alive=st.booleans())
    def live_or_die(self, group: str, alive: bool) -> None:
        self.engine.alive[group] = alive

    @invariant()
    def no_budget_is_overdrawn(self) -> None:
        assert self.engine.parameters() <= 250 and len(self.engine.growing()) <= 3
        assert (self.engine.controller.usage.left() >= -1e-6).all()

    @invariant()
    def seeds_of_the_dead_are_held(self) -> None:
        for name, group in self.engine.controller.groups.items():
            if group.dead and not self.engine.controller._out:
                held = {seed for seed in self.engine.growing() if seed[0] == name and self.engine.stages[seed] is Stage.GRAFTING}
                assert held <= self.engine.paused

    def teardown(self) -> None:
        """Neither starvation nor deadlock: with branches that end, every proposal of the living is answered or granted."""
        engine = self.engine
        engine.alive = dict.fromkeys(SITES, True)
        for _ in range(4 * SEEDS * (self.count + 1)):
            if not any(group.pending for group in engine.controller.groups.values()):
                break
            engine.run(10)
            for seed in engine.growing():
                engine.end(seed, kept=False)
        assert not any(group.pending for group in engine.controller.groups.values())
        engine.run(1)
        assert set(engine.ended) == set(engine.asked), "and each was told what became of it"


AnyHistory.TestCase.settings = settings(
    max_examples=examples(40), stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)
TestAnyHistory = AnyHistory.TestCase


def test_a_thousand_sites_are_allocated_at_once():
    sites = [f"layers.{number}" for number in range(1000)]
    controller = HierarchicalConfig(remote=sites, round="1step", max_parameters=20_000, max_active=10**6).build(0)
    card = {"seeds": 2, "blueprint": "mlp", "blueprints": BLUEPRINTS, "host_parameters": 1000, "telemetry_every": 1, "width": 8}
    controller.observe(RunStarted(tick=0, total_ticks=100, sites=[card | {"name": name} for name in sites]))
    draws = np.random.default_rng(0)
    for name in sites:
        blueprint = ("small", "mlp")[int(draws.integers(2))]
        controller.observe(Proposal(group=name, tick=1, commands=[germinate(name, name, 0, blueprint, expected=float(draws.random()))]))
    granted = controller.decide(1)
    used = sum(BLUEPRINTS[command.blueprint]["parameters"] for command in granted)
    assert 19_000 < used <= 20_000


def test_it_grants_no_more_than_the_run_allows():
    engine = Engine(remote(most=2))
    for number in range(4):
        for site in SITES:
            engine.propose(site, germinate(f"{site}{number}", site, number % SEEDS, "small"))
        engine.run(10)
        for seed in engine.growing():
            engine.end(seed, kept=False)
    assert len(engine.blueprints) == engine.controller.usage.germinated == 2
