"""The policy: when it decides, what it says, that it repeats and resumes, what its shield forbids, and when it is believed no longer."""

from __future__ import annotations

import itertools
import json
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from esper.controllers.policy.network import Words
from esper.controllers.policy.weights import packed, read_file
from esper.errors import UserError
from esper.lifecycle.stages import Stage
from esper.messages import Command, EmergencyStop, GateResult, Germinate
from tests.controllers.policies import LEARNT, WORDS, network, policy, saved

GROWS, STOPS, BOTH = (0.0, 50.0, -50.0), (0.0, -50.0, 50.0), (-50.0, 50.0, 50.0)

NUMBERS = itertools.count()


class World:
    """Lets every branch live for ten ticks in a ``Run``; its last look at the judge says ``worth``, and by that it is kept or culled."""

    def __init__(self, run: Any, controller: Any, worth: float = 0.0, loss: Callable[[int], float] = lambda tick: 1.0) -> None:
        self.ran, self.controller, self.worth, self.loss = run(controller, f"run {next(NUMBERS)}"), controller, worth, loss
        self.commands: list[Command] = []
        self.born: dict[tuple[str, int], int] = {}

    def start(self, tick: int = 0) -> World:
        self.ran.start(tick)
        return self

    def until(self, last: int) -> World:
        """Train on."""
        while self.ran.tick < last:
            self.ran.until(self.ran.tick + 1, lambda tick: {"validation/loss": self.loss(tick)})
            tick = self.ran.tick
            for command in self.ran.handed.get(tick, []):
                self.commands.append(command)
                if isinstance(command, Germinate):
                    self.born[command.site, command.seed] = tick
            for place, born in list(self.born.items()):
                if self.ran.stages[place] in (Stage.CULLED, Stage.CANCELLED):
                    self.ran.move(*place, Stage.DORMANT)
                    del self.born[place]
                elif tick - born == 10:
                    self._end(place, tick)
        return self

    def _end(self, place: tuple[str, int], tick: int) -> None:
        del self.born[place]
        for gate in ("final_gain", "no_harm"):
            said = {"gate": gate, "value": self.worth, "threshold": 0.0, "passed": self.worth > 0.0}
            self.ran.port.emit(GateResult(tick=tick, site=place[0], seed=place[1], branch=0, **said))
        self.ran.move(*place, Stage.FOSSILIZED if self.worth > 0.0 else Stage.CULLED)
        self.ran.move(*place, Stage.DORMANT)

    def of(self, kind: type) -> list[Any]:
        """The commands of a kind."""
        return [command for command in self.commands if isinstance(command, kind)]


@pytest.fixture
def file(tmp_path: Path) -> str:
    """A policy whose choices are drawn about evenly."""
    return saved(tmp_path)


def test_it_decides_at_its_times_and_within_its_limits(run, tmp_path):
    controller = policy(saved(tmp_path, network(GROWS)), count=2, max_active=3, until="40%", most=9)
    world = World(run, controller).start().until(100)
    ticks = sorted(world.ran.germinated)
    assert ticks[0] == 6 and set(ticks) <= {6, 11, 16, 21, 26, 31, 36, 41} and len(world.of(Germinate)) == 9
    active = 0
    for tick in range(100):
        active += len(world.ran.germinated.get(tick, [])) - len(world.ran.germinated.get(tick - 10, []))
        assert active <= 3 and len(world.ran.germinated.get(tick, [])) <= 2


def test_every_decision_is_explained(run, tmp_path):
    world = World(run, policy(saved(tmp_path, network(BOTH)), count=4)).start().until(30)
    assert world.of(Germinate) and world.of(EmergencyStop)
    for command in world.commands:
        why, chosen = command.why, command.why["chosen"]
        assert why["controller"] == "policy" and json.loads(json.dumps(why)) == why
        assert set(why["probabilities"]["action"]) == {"wait", "germinate", "stop"}
        assert sum(why["probabilities"]["action"].values()) == pytest.approx(1.0, abs=1e-5)
        if isinstance(command, Germinate):
            assert chosen == {"action": "germinate"} | {
                key: getattr(command, key) for key in ("site", "seed", "blueprint", "strategy", "objective")
            }
            assert set(why["probabilities"]) == {"action", "site", "blueprint", "strategy", "objective"}
            assert why["features"]["quiet"] == 0.5, "as lively as the site's mean"
        else:
            assert (chosen["site"], [chosen["seed"]]) == (command.select.site, command.select.seeds)
            assert f"{chosen['site']} {chosen['seed']}" in why["probabilities"]["branch"]
        assert why["features"]["progress"] > 0.0 and "expected" in why


def test_the_same_seed_decides_the_same_and_another_one_does_not(run, file):
    first, again, other = (World(run, policy(file, seed)).start().until(90).commands for seed in (0, 0, 1))
    assert first == again and first != other


def test_without_temperature_it_does_the_likeliest(run, file):
    first, other = (World(run, policy(file, seed, temperature=0.0)).start().until(90).commands for seed in (0, 1))
    assert first == other
    assert all(max(command.why["probabilities"]["action"].values()) == 1.0 for command in first)


@pytest.mark.parametrize("worth", [0.0, 0.9])
def test_it_goes_on_to_the_same_bits_from_a_checkpoint(run, tmp_path, worth):
    """Also where the heuristic has taken over (the branches are worth much more than was promised), and the file is another one by then."""
    file = saved(tmp_path, network((0.0, 2.0, 0.0), predicts=0.0))
    settings = {"ends": 3, "max_active": 2}
    whole = World(run, policy(file, **settings), worth).start().until(90)
    begun = World(run, policy(file, **settings), worth).start().until(42)
    assert (begun.controller.instead is not None) is (worth > 0.0)
    begun.ran.runner.hear()
    state, port = json.loads(json.dumps(begun.ran.runner.state(), allow_nan=False)), json.loads(json.dumps(begun.ran.port.state()))
    (tmp_path / "other").mkdir()
    resumed = World(run, policy(saved(tmp_path / "other", network(STOPS)), **settings), worth)
    resumed.ran.runner.load_state(state)
    resumed.ran.port.load_state(port)
    resumed.ran.stages, resumed.born = begun.ran.stages, begun.born
    resumed.start(42).until(90)
    assert begun.commands + resumed.commands == whole.commands and len(resumed.commands) > 3
    assert resumed.controller.state() == whole.controller.state()


# --- the shield ---


@pytest.mark.parametrize(
    ("loss", "grown"),
    [
        (lambda tick: math.nan if 20 <= tick < 50 else 1.0, False),
        (lambda tick: math.inf if 20 <= tick < 50 else 1.0, False),
        (lambda tick: 1.6 if 20 <= tick < 50 else 1.0, False),
        (lambda tick: 1.4 if 20 <= tick < 50 else 1.0, True),
    ],
    ids=["not a number", "infinite", "far above its best", "a little above it"],
)
def test_nothing_germinates_while_the_loss_diverges_whatever_the_network_wants(run, tmp_path, loss, grown):
    world = World(run, policy(saved(tmp_path, network(GROWS))), loss=loss).start().until(90)
    ticks = set(world.ran.germinated)
    assert any(21 <= tick <= 50 for tick in ticks) is grown
    assert any(tick < 21 for tick in ticks) and any(tick > 50 for tick in ticks)


def test_nothing_germinates_soon_after_a_rollback(run, tmp_path):
    world = World(run, policy(saved(tmp_path, network(GROWS)), embargo="30%")).start().until(12)
    place = next(iter(world.born))
    del world.born[place]
    world.ran.move(*place, Stage.ROLLED_BACK)
    world.until(90)
    assert not {tick for tick in world.ran.germinated if 12 < tick <= 43} and {tick for tick in world.ran.germinated if tick > 43}


def test_seeds_without_health_are_not_chosen(run, tmp_path):
    ran = run(policy(saved(tmp_path, network(GROWS))))
    ran.health |= dict.fromkeys([("fc1", n) for n in range(4)] + [("fc2", 0)], (float("nan"), 0.0, 0.0))
    world = World(lambda controller, name: ran, ran.runner.controller).start().until(60)
    assert {(command.site, command.seed) for command in world.of(Germinate)} == {("fc2", 1)}


def test_budgets_leave_out_what_is_too_large(run, tmp_path):
    world = World(run, policy(saved(tmp_path, network(GROWS)), max_parameters=5)).start().until(30)
    assert world.commands and {command.blueprint for command in world.of(Germinate)} == {"affine"}
    assert len(world.ran.germinated[6]) == 2 and len(world.of(Germinate)[:2]) * 2 <= 5


def test_a_branch_that_the_judge_found_to_gain_is_not_stopped_and_one_goes_at_a_time(run, tmp_path):
    world = World(run, policy(saved(tmp_path, network(GROWS)), count=4)).start().until(7)
    assert len(world.born) == 4
    world.controller.chooser.network = network(STOPS)
    good, *others = sorted(world.born)
    world.ran.port.emit(GateResult(tick=7, site=good[0], seed=good[1], branch=0, gate="gain", value=0.1, threshold=0.0, passed=True))
    world.until(13)
    (stop,) = world.of(EmergencyStop)
    assert (stop.select.site, stop.select.seeds[0]) in others
    world.until(15)
    assert good in world.born


def test_a_kept_branch_is_never_stopped(run, tmp_path):
    world = World(run, policy(saved(tmp_path, network(GROWS)), until="5%")).start().until(7)
    for place in list(world.born):
        world.ran.move(*place, Stage.FOSSILIZED)
        del world.born[place]
    world.controller.chooser.network = network(STOPS)
    assert not world.until(60).of(EmergencyStop)


# --- trust ---


def test_the_heuristic_takes_over_when_predictions_have_been_off_for_long_and_an_alert_says_so(run, tmp_path):
    controller = policy(saved(tmp_path, network(GROWS, predicts=0.9)), ends=4, tolerance=2.0, max_active=2)
    world = World(run, controller).start().until(90)
    whys = [command.why for command in world.of(Germinate)]
    own = [why for why in whys if why["controller"] == "policy"]
    others = [why for why in whys if why["controller"] == "heuristic"]
    assert 4 <= len(own) <= 6 and others and whys == own + others
    assert all(
        why["instead of"] == "policy" and "its predictions of the last 4 branches were off by 0.9" in why["because"] for why in others
    )
    assert not world.of(EmergencyStop)


def test_what_it_has_to_say_reaches_the_alerts_once(run, tmp_path):
    world = World(run, policy(saved(tmp_path, network(GROWS, predicts=0.9)), ends=2)).start()
    said = []
    say = world.ran.runner.complaints
    world.ran.runner.complaints = lambda: said.extend(say()) or []  # type: ignore[method-assign, func-returns-value]
    world.until(60)
    (text,) = said
    assert text.startswith("controller=policy decides no more: ") and text.endswith("The heuristic decides in its stead.")


def test_after_the_heuristic_has_taken_over_the_shield_and_the_most_still_hold(run, tmp_path):
    controller = policy(saved(tmp_path, network(GROWS, predicts=0.9)), ends=2, most=5)
    world = World(run, controller, loss=lambda tick: math.nan if 15 <= tick < 60 else 1.0).start().until(90)
    assert controller.instead is not None and not {tick for tick in world.ran.germinated if 16 <= tick <= 60}
    assert len(world.of(Germinate)) == 5 and max(world.ran.germinated) > 60


def test_a_network_whose_predictions_hold_goes_on_deciding(run, tmp_path):
    controller = policy(saved(tmp_path, network(GROWS, predicts=0.0)), ends=4)
    world = World(run, controller).start().until(90)
    assert controller.instead is None and len(world.of(Germinate)) > 10


# --- the file ---


def test_a_file_repeats_to_the_bit_and_comes_back_whole(tmp_path):
    file = saved(tmp_path)
    again = read_file(file)
    assert again.data == packed(network(), LEARNT).data == packed(again.network, again.learnt).data
    assert again.network.words == WORDS and again.learnt == LEARNT


class _Bomb:
    def __reduce__(self):
        return Path.touch, (Path("exploded"),)


def _foreign(folder: Path, kind: str) -> str:
    path, whole = folder / f"{kind}.safetensors", packed(network(), LEARNT).data
    if kind == "pickle":
        path.write_bytes(pickle.dumps(_Bomb()))
    elif kind == "model":
        from safetensors.torch import save

        path.write_bytes(save(network().state_dict()))
    elif kind == "older":
        path.write_bytes(whole.replace(b'\\"progress\\"', b'\\"PROGRESS\\"'))
    elif kind == "short":
        path.write_bytes(whole[:-40])
    elif kind == "nan":
        path.write_bytes(packed(network(predicts=math.nan), LEARNT).data)
    elif kind == "empty":
        path.write_bytes(b"")
    return str(path)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("pickle", "is no policy that esper learn wrote"),
        ("model", "is no policy that esper learn wrote"),
        ("empty", "is no policy that esper learn wrote"),
        ("older", "learnt by another version of esper"),
        ("short", "is damaged"),
        ("nan", "is damaged"),
        ("missing", r"there is no such file; esper learn to=\S+ makes one"),
    ],
)
def test_a_file_that_is_no_policy_is_refused_in_one_sentence_and_runs_no_code(tmp_path, monkeypatch, kind, text):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=text) as refused:
        policy(_foreign(tmp_path, kind))
    assert str(refused.value).count("\n") == 0 and not Path("exploded").exists()


def test_without_a_file_it_says_what_it_needs():
    with pytest.raises(UserError, match=r"controller\.weights=<file>, which esper learn writes"):
        policy("")


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"strategies": ["momentum"]}, "controller.strategies names 'momentum', of which .* knows nothing; it knows drift, linear"),
        ({"every": "1epoch"}, "cannot see epochs"),
    ],
)
def test_settings_that_mean_nothing_are_refused_when_it_is_built(file, settings, text):
    with pytest.raises(UserError, match=text):
        policy(file, **settings)


@pytest.mark.parametrize(
    ("words", "settings", "text"),
    [
        (WORDS, {"germinate_at": "60%", "until": "50%"}, "give an earlier time"),
        (WORDS, {"max_parameters": 1}, "nothing would ever germinate"),
        (Words(("conv",), ("linear",), ("shadow",)), {}, "has learnt of conv, which fits no site of this run"),
        (Words(("mlp",), ("my own",), ("shadow",)), {}, "has learnt of the strategies my own, and this run can have linear"),
    ],
)
def test_what_could_never_grow_ends_the_run_at_its_start(run, tmp_path, words, settings, text):
    with pytest.raises(UserError, match=text):
        run(policy(saved(tmp_path, network(words=words)), **settings)).start().until(1)
