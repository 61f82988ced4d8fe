"""The judge: sign, pairing and bound of the gain, norm statistics measured anew for either side, and no trace left."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from growing import Loop, batch, germinate, same, sample_loss, short
from scipy import stats
from torch import nn

from esper.engine.judging.judge import Gain, Judge, lower_bound, quantile
from esper.lifecycle import Stage, spent
from esper.messages import Cancel, Selector
from esper.seeds import Branch

S = Stage


@pytest.mark.parametrize("dof", [1, 2, 3, 4, 7, 30, 249, 5000])
@pytest.mark.parametrize("tail", [0.5, 0.2, 0.05, 0.025, 0.05 / 42, 1e-6])
def test_the_quantile_is_students(dof: int, tail: float):
    assert quantile(tail, dof) == pytest.approx(stats.t.isf(tail, dof), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("n", [2, 3, 10, 250])
@pytest.mark.parametrize("error", [0.05, 0.05 / 6, 0.001])
def test_the_bound_is_the_lower_end_of_the_t_interval(n: int, error: float):
    values = torch.randn(n, generator=torch.Generator().manual_seed(n), dtype=torch.float64) + 0.3
    gain = lower_bound(values, error)
    expected = stats.ttest_1samp(values.numpy(), 0.0, alternative="greater").confidence_interval(1.0 - error).low
    assert gain.mean == pytest.approx(float(values.mean())) and gain.samples == n
    assert gain.bound == pytest.approx(float(expected), rel=1e-6)


def test_the_bound_is_wrong_no_more_often_than_it_says():
    draws = torch.randn(2000, 8, generator=torch.Generator().manual_seed(1))
    wrong = sum(lower_bound(row, 0.05).bound > 0.0 for row in draws)
    assert 60 <= wrong <= 140


@pytest.mark.parametrize("values", [[], [1.0], [1.0, math.nan], [1.0, math.inf], [math.inf, math.inf]])
def test_what_cannot_be_bounded_is_nan(values: list[float]):
    assert math.isnan(lower_bound(torch.tensor(values), 0.05).bound)


def grown(host: str = "mlp", **settings: Any) -> tuple[Loop, Branch]:
    loop = Loop(host, settings={"lifecycle": short(evaluating_min="15step")} | settings)
    loop.port.script = {1: [germinate(loop.grow.registry.sites[0].name, seed) for seed in (0, 1)]}
    branch = loop.until(S.EVALUATING)
    return loop, branch


def helping(loop: Loop, branch: Branch, sign: float) -> None:
    """Makes the branch add a constant to its chunk, and the head turn that into certainty of class 0 (or of the others)."""
    bank: Any = loop.grow.registry.layers[branch.site].bank("mlp")
    with torch.no_grad():
        for stack in bank.stacks.values():
            stack[branch.slot] = 0.0
        bank.stacks["b2"][branch.slot] = 1.0
        loop.model.head.weight.zero_()
        loop.model.fc2.weight.zero_()
        start, end = loop.grow.registry.sites[0].geometry.bounds(branch.seed)
        loop.model.fc2.weight[0, start:end] = 1.0
        loop.model.head.weight[0, 0] = sign


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_gain_is_loss_off_minus_loss_on_paired_by_sample(sign: float):
    data = (torch.randn(40, 6), torch.zeros(40, dtype=torch.int64))
    loop, branch = grown(judge=[(data[0][:25], data[1][:25]), (data[0][25:], data[1][25:])])
    helping(loop, branch, sign)
    (gain,) = loop.grow.judge.look([branch], [0.05])
    assert math.copysign(1.0, gain.mean) == sign and gain.samples == 40
    with torch.no_grad():
        loop.model.eval()
        on = sample_loss(loop.model, data)
        with loop.grow.registry.without(branch):
            off = sample_loss(loop.model, data)
    expected = lower_bound((off - on).double(), 0.05)
    assert gain.mean == pytest.approx(expected.mean, rel=1e-5) and gain.bound == pytest.approx(expected.bound, rel=1e-4)


@pytest.mark.parametrize("host", ["dropout", "batch_norm", "cnn_batch", "transformer"])
def test_a_look_leaves_no_trace(host: str):
    loop, branch = grown(host)
    loop.backward()
    loop.model.train()
    norms = [m for m in loop.model.modules() if isinstance(m, nn.BatchNorm1d)]
    if norms:
        norms[0].eval()
    flags = {name: module.training for name, module in loop.model.named_modules()}
    momenta = [module.momentum for module in loop.model.modules() if hasattr(module, "momentum")]
    before, gradients = {k: v.clone() for k, v in loop.model.state_dict().items()}, loop.host_gradients()
    torch.manual_seed(3)
    loop.grow.judge.look([branch], [0.05])
    drawn = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(1))
    same(before, {k: v.clone() for k, v in loop.model.state_dict().items()})
    same(gradients, loop.host_gradients())
    assert flags == {name: module.training for name, module in loop.model.named_modules()}
    assert momenta == [module.momentum for module in loop.model.modules() if hasattr(module, "momentum")]


def test_norm_statistics_are_measured_anew_for_either_side():
    loop, branch = grown("batch_norm")
    seen: list[torch.Tensor] = []
    loop.model.norm.register_forward_hook(lambda m, i, o: None if m.training else seen.append(m.running_mean.clone()))
    kept = loop.model.norm.running_mean.clone()
    loop.grow.judge.look([branch], [0.05])
    on, off = seen
    assert not torch.equal(on, off) and not torch.equal(on, kept)
    recent = list(loop.grow.judge.recent)
    with torch.no_grad():
        expected = torch.stack([loop.model.fc1(x).mean(0) for x, _ in recent]).mean(0)
    torch.testing.assert_close(on, expected)
    assert torch.equal(loop.model.norm.running_mean, kept)


def test_norms_that_the_user_froze_keep_their_statistics():
    loop, branch = grown("batch_norm")
    loop.model.norm.eval()
    seen: list[torch.Tensor] = []
    loop.model.norm.register_forward_hook(lambda m, i, o: seen.append(m.running_mean.clone()))
    loop.grow.judge.look([branch], [0.05])
    assert all(torch.equal(value, loop.model.norm.running_mean) for value in seen)


def test_norms_of_grown_blocks_are_measured_anew_too():
    loop = Loop("cnn_batch", settings={"blueprint": "block"})
    loop.port.script = {1: [germinate(loop.grow.registry.sites[0].name)]}
    branch = loop.until(S.EVALUATING)
    block = loop.grow.registry.layers[0].bank("block").blocks["0"]
    fresh: list[bool] = []
    block.norm1.register_forward_hook(lambda m, i, o: fresh.append(m.training and m.momentum is None))
    loop.grow.judge.look([branch], [0.05])
    assert any(fresh)


def test_other_branches_are_the_same_on_both_sides_even_after_commands_of_the_same_tick():
    """Stale plans would hold a branch that a command has just taken away."""
    loop = Loop("transformer", settings={"blueprint": "block", "lifecycle": short(readiness=-1.0, training_min="30step")})
    loop.port.script = {1: [germinate("blocks.0")]}
    loop.run(3)
    loop = Loop(settings={"lifecycle": short(evaluating_min="4step", judge_every="1step", gain=1e6)}, commands={1: [germinate(seed=0)]})
    branch = loop.until(S.EVALUATING)
    t = loop.grow.tick_number
    loop.port.script = {t + 1: [germinate(seed=1)], t + 4: [Cancel(id="c", select=Selector(site="fc1", seeds=[1]))]}
    loop.run(4)
    assert loop.port.acks["c"][0] == "applied" and int(loop.grow.registry.table.looks[branch.row]) == 1


def test_every_look_spends_error_and_more_looks_ask_for_more(monkeypatch: pytest.MonkeyPatch):
    loop = Loop(settings={"lifecycle": short(gain=1e6, judge_every="2step")}, commands={1: [germinate()]})
    asked: list[float] = []
    look = Judge.look
    monkeypatch.setattr(Judge, "look", lambda self, b, errors: (asked.extend(errors), look(self, b, errors))[1])
    loop.until(S.CULLED)
    assert asked == [spent(0.05, k) for k in range(1, len(asked) + 1)] and len(asked) > 5
    looks = [said.look for said in loop.port.gates if said.gate == "gain"]
    assert looks == list(range(1, len(asked) + 1))


def test_between_two_looks_lies_the_time_that_the_lifecycle_says():
    loop = Loop(settings={"lifecycle": short(gain=1e6, judge_every="3step")}, commands={1: [germinate()]})
    loop.until(S.CULLED)
    ticks = [said.tick for said in loop.port.gates if said.gate == "gain"]
    assert len(ticks) > 3 and {later - earlier for earlier, later in itertools.pairwise(ticks)} == {3}


def test_a_gain_of_nothing_opens_no_gate_even_where_none_is_asked_for():
    loop = Loop(settings={"lifecycle": short(gain=0.0)}, commands={1: [germinate()]})
    branch = loop.until(S.EVALUATING)
    assert not loop.grow.gates._take(branch, Gain(0.0, 0.0, 64), loop.grow.tick_number)
    assert loop.grow.gates._take(branch, Gain(0.1, 0.05, 64), loop.grow.tick_number)


def test_a_loss_that_is_not_finite_when_judged_rolls_back():
    loop = Loop(commands={1: [germinate()]})
    branch = loop.until(S.EVALUATING)
    loop.grow.judge.data = [(torch.full((4, 6), float("nan")), torch.zeros(4, dtype=torch.int64))]
    loop.until(S.ROLLED_BACK, most=5)
    assert loop.port.transitions[-1].cause == "judged: the loss is not finite" and math.isnan(branch.bound)


def test_a_judge_set_that_runs_empty_opens_no_gate():
    loop = Loop(commands={1: [germinate()]})
    branch = loop.until(S.EVALUATING)
    loop.grow.judge.data = []
    loop.until(S.CULLED, most=30)
    asked = [said for said in loop.port.gates if said.gate == "gain"]
    assert asked and not any(said.passed for said in asked) and math.isnan(branch.gain)


def test_the_gain_of_a_batch_mean_counts_batches():
    data = [batch(number=n) for n in range(5)]
    loop, branch = grown(judge=data, judge_loss=lambda model, one: sample_loss(model, one).mean())
    (gain,) = loop.grow.judge.look([branch], [0.05])
    assert gain.samples == 5
