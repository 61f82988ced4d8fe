"""A kept branch replaced in place: another learns in its stead unfelt, takes its place where the judge says so, or leaves no trace."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from growing import Loop, germinate, same, short
from torch import Tensor

from esper.blueprints import Block
from esper.engine.judging.judge import Gain, Judge
from esper.engine.snapshot import branch_state
from esper.lifecycle import Stage
from esper.messages import ApplyTogether, Cancel, EmergencyStop, ReplaceBranch, Selector
from esper.seeds import Branch
from esper.trainer.governor import Anomaly, Governor, GovernorSettings

S = Stage
FC1 = Selector(site="fc1", seeds=[0])
AGES = {"training_min": "4step", "training_max": "12step", "evaluating_min": "4step", "evaluating_max": "12step", "judge_every": "3step"}


def replace(**names: Any) -> ReplaceBranch:
    return ReplaceBranch(id="replace", site="fc1", seed=0, **names)


def kept(**settings: Any) -> Loop:
    """A loop with a fossil, branch 0 at seed 0 of fc1."""
    loop = Loop(settings={"lifecycle": short(**AGES), **settings}, commands={1: [germinate()]})
    loop.until(S.FOSSILIZED)
    return loop


def values(loop: Loop, branch: int) -> dict[str, Tensor]:
    """Copies of a branch's parameters, moments and steps, and of its α."""
    saved = branch_state(loop.grow.registry, branch)
    rows = {f"{name}.{n}": value for name, held in saved["rows"].items() for n, value in enumerate(held)}
    return rows | {"steps": saved["steps"], "alpha": loop.grow.registry.branches.alpha[branch].clone()}


def apply(loop: Loop, command: Any) -> tuple[str, str]:
    found = loop.grow.executor.apply(command, loop.grow.tick_number)
    loop.grow.registry.refresh()
    loop.grow._prepare()
    return found


def verdicts(monkeypatch: pytest.MonkeyPatch, *bounds: float) -> list[tuple[int, int]]:
    """Let the judge answer these bounds one after another, the last one for ever; returns who was compared with whom."""
    asked: list[tuple[int, int]] = []

    def answer(self: Judge, successor: Branch, predecessor: Branch, error: float) -> Gain:
        asked.append((successor.id, predecessor.id))
        bound = bounds[min(len(asked), len(bounds)) - 1]
        return Gain(bound, bound, 64)

    monkeypatch.setattr(Judge, "exchange", answer)
    return asked


def codes(loop: Loop) -> list[str]:
    return [alert.code.removeprefix("replacement_") for alert in loop.port.alerts if alert.code.startswith("replacement_")]


@pytest.mark.parametrize("names", [{}, {"start": "copy"}, {"blueprint": "glu"}], ids=["fresh", "copy", "other kind"])
def test_while_it_learns_nothing_of_the_host_or_the_branch_feels_it(names: dict[str, Any]):
    with_it, without = kept(), kept()
    assert apply(with_it, replace(**names)) == ("applied", "")
    before = values(with_it, 0)
    losses = [[loop.step() for _ in range(3)] for loop in (with_it, without)]
    assert losses[0] == losses[1]
    same(with_it.host_state(), without.host_state())
    same(values(with_it, 0), before)
    successor = with_it.grow.registry.branches[1]
    assert successor.stage is S.TRAINING and successor.replaces == 0
    moved = values(with_it, 1)
    fresh = kept()
    apply(fresh, replace(**names))
    start = values(fresh, 1)
    assert any(not torch.equal(moved[name], start[name]) for name in moved), "it learns"
    if names.get("start") == "copy":
        same({k: v for k, v in start.items() if k != "alpha"}, {k: v for k, v in before.items() if k != "alpha"})
    else:
        assert all(not torch.equal(start[name], before[name]) for name in start if name in before and name.startswith("w1.0"))


def test_the_judge_compares_both_in_the_same_place():
    loop = kept()
    apply(loop, replace(start="copy"))
    registry, judge = loop.grow.registry, loop.grow.judge
    assert judge is not None
    old, new = registry.branches.entries
    assert judge.exchange(new, old, 0.05).mean == 0.0, "a copy is as good as what it copies"
    with torch.no_grad():
        for stack in registry.layers[0].bank("mlp").stacks.values():
            stack[new.slot] = 0.0
    off = judge.losses([old])
    gain = judge.exchange(new, old, 0.05)
    assert gain.mean == pytest.approx(float((judge.losses([]) - off).mean())) and gain.mean < 0.0, "one that gives nothing is off"
    loop.grow.replacing._put_in(new)
    assert judge.exchange(new, old, 0.05).mean == pytest.approx(gain.mean), "whichever of them is there"


def test_one_that_is_better_takes_the_place_and_twice_better_keeps_it(monkeypatch: pytest.MonkeyPatch):
    loop = kept()
    asked = verdicts(monkeypatch, 0.0, 0.5)
    apply(loop, replace(start="copy"))
    registry = loop.grow.registry
    old, new = registry.branches.entries
    before = values(loop, 0)
    loop.run(7)  # looks at ages 4 and 7: the first does not pass, since nothing was gained
    assert asked == [(1, 0)] * 2 and old.held and new.stage is S.FOSSILIZED
    assert [b.id for b in registry.blended(0)] == [1] and int(registry.table.branch[0]) == 1
    assert float(registry.branches.alpha[1]) == float(before["alpha"]) == 1.0
    frozen = values(loop, 1)
    loop.run(3)
    same(values(loop, 0), before)
    same(values(loop, 1), frozen)
    loop.run(1)
    assert not old.alive and old.stage is S.CULLED and new.alive and codes(loop) == ["begun", "on_trial", "kept"]
    assert [gate.look for gate in loop.port.gates if gate.gate == "replacement"] == [1, 2, 3]
    assert registry.table.stage_of(0) is S.FOSSILIZED
    loop.run(3)
    bank: Any = registry.layers[0].bank("mlp")
    assert sum(bank.used) == 1
    assert apply(loop, replace()) == ("applied", ""), "and may be replaced in its turn"


@pytest.mark.parametrize("bounds", [(-1.0,), (0.5, -1.0)], ids=["never put in", "on trial"])
def test_one_that_is_not_better_is_rolled_back_to_the_bit(bounds: tuple[float, ...], monkeypatch: pytest.MonkeyPatch):
    loop = kept()
    registry = loop.grow.registry
    verdicts(monkeypatch, *bounds)
    before, old = values(loop, 0), registry.branches[0]
    table, told = registry.table.state(), (old.stage, list(old.path), old.gain, old.bound)
    apply(loop, replace())
    loop.run(5)
    assert old.held is (len(bounds) == 2)
    loop.run(12)
    assert registry.branches[1].stage is S.ROLLED_BACK and not registry.branches[1].alive
    same(values(loop, 0), before)
    same(registry.table.state(), table)
    assert told == (old.stage, old.path, old.gain, old.bound) and not old.held
    assert [b.id for b in registry.blended(0)] == [0]
    assert codes(loop)[-1] == "rolled_back"
    assert registry.history.of(0)[-1].cause.startswith("branch 1 rolled back" if len(bounds) == 2 else "gain")


@pytest.mark.parametrize("bounds", [(-1.0, 0.5), (0.5, -1.0)], ids=["kept", "rolled back"])
@pytest.mark.parametrize("after", [2, 6, 8])
def test_a_state_taken_in_the_midst_goes_on_with_the_same_bits(bounds: tuple[float, ...], after: int, monkeypatch: pytest.MonkeyPatch):
    def answer(self: Judge, successor: Branch, predecessor: Branch, error: float) -> Gain:
        bound = bounds[min(successor.looks, 2) - 1]
        return Gain(bound, bound, 64)

    monkeypatch.setattr(Judge, "exchange", answer)
    whole = kept()
    apply(whole, replace(start="copy"))
    whole.run(after)
    rng = torch.get_rng_state()
    second = Loop(settings={"lifecycle": short(**AGES), "state": whole.grow.state()})
    second.model.load_state_dict(whole.host_state(), strict=False)
    second.optimizer.load_state_dict(copy.deepcopy(whole.optimizer.state_dict()))
    second.step_number = whole.step_number
    torch.set_rng_state(rng)
    losses = [[loop.step() for _ in range(16)] for loop in (whole, second)]
    assert losses[0] == losses[1]
    same(whole.host_state(), second.host_state())
    assert repr(whole.grow.observer.branch_cards()) == repr(second.grow.observer.branch_cards())
    assert whole.grow.observer.seed_cards() == second.grow.observer.seed_cards()
    assert len(second.grow.replacing.trials()) == 0


def test_a_successor_that_fails_is_rolled_back_and_the_branch_stays():
    loop = kept()
    before = values(loop, 0)
    apply(loop, replace())
    with torch.no_grad():
        next(iter(loop.grow.registry.layers[0].bank("mlp").stacks.values()))[1] = float("nan")
    loop.run(2)
    assert codes(loop) == ["begun", "rolled_back"] and "not finite" in loop.port.alerts[-1].text
    same(values(loop, 0), before)


def test_the_governor_takes_away_a_culprit_that_is_on_trial(monkeypatch: pytest.MonkeyPatch):
    verdicts(monkeypatch, 0.5)
    loop = kept(lifecycle=short(**(AGES | {"evaluating_min": "8step"})))
    before = values(loop, 0)
    apply(loop, replace())
    loop.run(6)
    governor = Governor(loop.grow, GovernorSettings(every=10))
    assert loop.grow.registry.branches[0].held
    assert "which stays" not in governor._remove(loop.grow.registry.branches[1], Anomaly(9, "the loss is nan"))
    assert [b.id for b in loop.grow.registry.blended(0)] == [0] and "governor: the loss is nan" in loop.port.alerts[-1].text
    same(values(loop, 0), before)


STOPS = {"all": EmergencyStop(id="s"), "seed": EmergencyStop(id="s", select=FC1), "cancel": Cancel(id="s", select=FC1)}


@pytest.mark.parametrize("stop", STOPS.values(), ids=STOPS.keys())
@pytest.mark.parametrize("after", [2, 6])
def test_a_command_ends_a_trial(stop: Any, after: int, monkeypatch: pytest.MonkeyPatch):
    verdicts(monkeypatch, 0.5)
    loop = kept(lifecycle=short(**(AGES | {"evaluating_min": "8step"})))
    before = values(loop, 0)
    apply(loop, replace())
    loop.run(after)
    assert loop.grow.registry.branches[0].held is (after == 6)
    assert apply(loop, stop) == ("applied", "")
    same(values(loop, 0), before)
    assert [b.id for b in loop.grow.registry.branches.living()] == [0] and codes(loop)[-1] == "rolled_back"


def test_what_cannot_be_replaced_is_refused_in_words():
    loop = Loop(settings={"lifecycle": short(**AGES)}, commands={1: [germinate()]}).run(4)
    assert "only a FOSSILIZED" in apply(loop, replace())[1]
    assert "no site 'fc9'" in apply(loop, ReplaceBranch(id="r", site="fc9", seed=0))[1]
    loop.until(S.FOSSILIZED)
    assert "starts fresh or copy" in apply(loop, replace(start="warm"))[1]
    assert "a copy of branch 0 is of its blueprint mlp" in apply(loop, replace(start="copy", blueprint="glu"))[1]
    assert "no blueprint 'moss'" in apply(loop, replace(blueprint="moss"))[1]
    twice = ApplyTogether(id="t", commands=[replace(), replace()])
    assert "being replaced already" in apply(loop, twice)[1] and len(loop.grow.registry.branches) == 1
    assert apply(loop, replace())[0] == "applied"
    assert "being replaced already" in apply(loop, replace())[1]
    loop.grow.machine.reseed = True
    assert apply(loop, germinate()) == ("refused", "its branch is being replaced")


def test_no_trial_without_what_decides_or_teaches_it():
    loop = kept()
    loop.grow.gates.judge = None
    assert "no judge set" in apply(loop, replace())[1]
    regressing = kept(lifecycle=short(objective="functional_gradient", gain=0.0, **AGES))
    assert "lifecycle.objective=shadow alone, and this run's is functional_gradient" in apply(regressing, replace())[1]


def test_a_block_is_replaced_too(monkeypatch: pytest.MonkeyPatch):
    verdicts(monkeypatch, 0.5)
    loop = Loop("cnn_group", settings={"blueprint": Block(start="copy"), "per_site": 1, "lifecycle": short(gain=0.0, **AGES)})
    site = loop.grow.registry.sites[0].name
    monkeypatch.setattr(type(loop.grow.gates), "look", lambda self, branches, tick: [True] * len(branches))
    loop.port.script = {1: [germinate(site)]}
    loop.until(S.FOSSILIZED)
    assert apply(loop, ReplaceBranch(id="r", site=site, seed=0, start="copy")) == ("applied", "")
    loop.run(12)
    assert [b.id for b in loop.grow.registry.branches.living()] == [1] and codes(loop) == ["begun", "on_trial", "kept"]


def test_what_is_exported_in_the_midst_is_what_runs(monkeypatch: pytest.MonkeyPatch):
    verdicts(monkeypatch, 0.5)
    loop = kept(lifecycle=short(**(AGES | {"evaluating_min": "8step"})))
    apply(loop, replace())
    inputs = loop.batch(5)[0]
    for _ in range(2):
        loop.run(3)
        plain = loop.grow.export().eval()
        loop.model.eval()
        torch.testing.assert_close(plain(inputs), loop.model(inputs), rtol=1e-5, atol=1e-6)
        loop.model.train()
    assert loop.grow.registry.branches[0].held
