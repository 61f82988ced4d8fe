"""The bandit: when it decides, what it says of it, that it repeats and resumes, and that it learns what pays."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest

from esper.controllers.bandit import BanditConfig
from esper.errors import UserError
from esper.lifecycle.stages import Stage
from esper.messages import GateResult, Germinate

SETTINGS: dict[str, Any] = {"germinate_at": "5%", "every": "5%", "until": "90%", "embargo": "1%"}


class World:
    """Lets every branch live for ten ticks in a ``Run``; those at the places that pay are kept with a gain, the others culled."""

    def __init__(self, run: Any, controller: Any, pays: Any) -> None:
        self.ran, self.controller, self.pays = run(controller), controller, pays
        self.born: dict[tuple[str, int], tuple[int, Germinate]] = {}
        self.commands: list[Germinate] = []

    def start(self, tick: int = 0) -> World:
        self.ran.start(tick)
        return self

    def until(self, last: int) -> World:
        """Train on; a command's explanation comes back in its transition, as the trainer sends it."""
        while self.ran.tick < last:
            self.ran.until(self.ran.tick + 1, lambda tick: {"validation/loss": 1.0})
            tick = self.ran.tick
            for command in self.ran.handed.get(tick, []):
                self.commands.append(command)
                self.born[command.site, command.seed] = tick, command
                self.controller.credit.lives[command.site, command.seed].why = dict(command.why)
            for place, (born, command) in list(self.born.items()):
                if tick - born == 10:
                    self._end(place, command, tick)
        return self

    def _end(self, place: tuple[str, int], command: Germinate, tick: int) -> None:
        del self.born[place]
        gain = self.pays(command)
        for gate in ("final_gain", "no_harm"):
            self.ran.port.emit(
                GateResult(tick=tick, site=place[0], seed=place[1], branch=0, gate=gate, value=gain, threshold=0.0, passed=gain > 0)
            )
        self.ran.move(*place, Stage.FOSSILIZED if gain > 0 else Stage.CULLED, command.blueprint)
        self.ran.move(*place, Stage.DORMANT)  # a new generation may grow there


def bandit(seed: int = 0, **settings: Any) -> Any:
    return BanditConfig(**(SETTINGS | settings)).build(seed)


def nothing(command: Germinate) -> float:
    return 0.0


def at_fc1(command: Germinate) -> float:
    return 0.3 if command.site == "fc1" else 0.0


def test_it_decides_at_its_times_and_within_its_limits(run):
    world = World(run, bandit(count=2, max_active=3, until="40%"), nothing).start().until(100)
    assert set(world.ran.germinated) <= {6, 11, 16, 21, 26, 31, 36, 41} and 6 in world.ran.germinated
    active = 0
    for tick in range(100):
        active += len(world.ran.germinated.get(tick, [])) - len(world.ran.germinated.get(tick - 10, []))
        assert active <= 3


def test_every_decision_is_explained(run):
    world = World(run, bandit(), nothing).start().until(20)
    assert world.commands
    for command in world.commands:
        why = command.why
        chosen = {key: getattr(command, key) for key in ("site", "seed", "blueprint", "strategy", "objective")}
        assert why["controller"] == "bandit" and why["chosen"] == chosen
        features = why["features"]
        assert features["bias"] == 1.0 and features[f"site={command.site}"] == 1.0 and features[f"blueprint={command.blueprint}"] == 1.0
        assert features["quiet"] == 0.5, "as lively as the site's mean"
        assert set(why["probabilities"]) == {"site", "blueprint", "strategy", "objective"}
        assert all(sum(chances.values()) == pytest.approx(1.0) for chances in why["probabilities"].values())
        assert why["sampled"] > 0.0 and why["uncertainty"] > 0.0
        assert json.loads(json.dumps(why)) == why


def test_the_same_seed_decides_the_same_and_another_one_does_not(run):
    first, again, other = (World(run, bandit(seed), at_fc1).start().until(90).commands for seed in (0, 0, 1))
    assert first == again and first != other


def test_it_goes_on_to_the_same_bits_from_a_checkpoint(run, bus):
    whole = World(run, bandit(), at_fc1).start().until(90)
    begun = World(run, bandit(), at_fc1).start().until(42)
    state, port = json.loads(json.dumps(begun.ran.runner.state())), json.loads(json.dumps(begun.ran.port.state()))
    resumed = World(run, bandit(), at_fc1)
    resumed.ran.runner.load_state(state)
    resumed.ran.port.load_state(port)
    resumed.ran.stages, resumed.born = begun.ran.stages, begun.born
    resumed.start(42).until(90)
    assert begun.commands + resumed.commands == whole.commands
    assert resumed.controller.own.state() == whole.controller.own.state()


def test_it_learns_where_growing_pays_and_remembers_it_in_the_next_run(run, tmp_path):
    from esper.controllers.memory import keep

    memory = str(tmp_path / "memory.json")
    shares = []
    for number in range(4):
        world = World(run, bandit(number, memory=memory, max_active=2), at_fc1).start().until(100)
        counts = Counter(command.site for command in world.commands)
        shares.append(counts["fc1"] / sum(counts.values()))
        (tmp_path / str(number)).mkdir()
        keep(world.controller, memory, tmp_path / str(number), 100)
    assert shares[-1] >= 0.9 and shares[-1] > shares[0], shares
    assert (tmp_path / "0" / "controller_evidence.json").is_file()


def test_it_learns_that_a_cheap_blueprint_pays_more_than_a_dear_one(run):
    world = World(run, bandit(max_active=2), lambda command: 0.3).start().until(100)
    late = Counter(command.blueprint for command in world.commands[-10:])
    assert late["affine"] >= 8, "the same gain for 2 parameters and for 100 or 300"


def test_it_stops_growing_when_nothing_pays(run):
    world = World(run, bandit(optimism=0.02, noise=0.01, rent=0.3), nothing).start().until(95)
    decided = sorted(world.ran.germinated)
    assert len(decided) < 10 and sum(tick > 50 for tick in decided) <= 1, decided  # out of 18 times; a draw may still try one


def test_budgets_leave_out_what_is_too_large(run):
    world = World(run, bandit(max_parameters=50), nothing).start().until(30)
    assert world.commands and {command.blueprint for command in world.commands} == {"affine"}


def test_seeds_without_health_are_not_chosen(run):
    ran = run(bandit())
    ran.health |= dict.fromkeys([("fc1", n) for n in range(4)] + [("fc2", 0)], (float("nan"), 0.0, 0.0))
    world = World(lambda controller: ran, ran.runner.controller, nothing).start().until(90)
    assert {(command.site, command.seed) for command in world.commands} == {("fc2", 1)}


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"strategies": ["lineal"]}, "controller.strategies names 'lineal'"),
        ({"objectives": ["luck"]}, "controller.objectives names 'luck'"),
        ({"every": "1epoch"}, "cannot see epochs"),
        ({"memory": "/nowhere/at/all/memory.json"}, "there is no folder"),
    ],
)
def test_settings_that_mean_nothing_are_refused_when_it_is_built(settings, text):
    with pytest.raises(UserError, match=text):
        bandit(**settings)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"germinate_at": "60%", "until": "50%"}, "give an earlier time"),
        ({"blueprints": ["transformer"]}, "fits no site; blueprints that do: affine, mlp"),
        ({"max_parameters": 1}, "nothing would ever germinate"),
    ],
)
def test_settings_under_which_nothing_could_grow_end_the_run_at_its_start(run, settings, text):
    with pytest.raises(UserError, match=text):
        run(bandit(**settings)).start().until(1)


def test_it_germinates_no_more_than_the_run_allows(run):
    assert len(World(run, bandit(most=3), at_fc1).start().until(95).commands) == 3


def test_without_experience_it_begins_where_growth_is_needed(run):
    def found(**settings: Any) -> int:
        """How often the first branch of a run grows at the seed that is silent, over eight runs."""
        there = 0
        for seed in range(8):
            controller = bandit(seed, count=1, **settings)
            ran = run(controller, f"need {seed} {settings}")
            ran.health["fc1", 2] = (0.0, 1.0, 0.0)
            there += ran.start().until(8).germinated.get(6) == [("fc1", 2)]
        return there

    assert found() >= 7 > 5 > found(need=0.0)
