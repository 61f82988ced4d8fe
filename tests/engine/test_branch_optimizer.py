"""Branches learn by AdamW with a state of their own, follow the host's schedule, and are otherwise left alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from growing import HOSTS, Loop, Notebook, batch, build, germinate, sample_loss, set_stage, short
from torch import nn
from torch.optim import lr_scheduler as schedules

from esper.engine.attach import attach
from esper.engine.learning.branch_optimizer import PATIENCE, BranchLearning, BranchOptimizer
from esper.engine.measurements import Measured
from esper.lifecycle import Stage
from esper.messages import ApplyTogether, Cancel, ChangeStrategy, EmergencyStop, PauseGrafting, RequestReport, Selector

S = Stage


def bank_of(loop: Loop, blueprint: str = "mlp") -> Any:
    return loop.grow.registry.layers[0].bank(blueprint)


def learning_alone(**changes: Any) -> Loop:
    lifecycle = short(readiness=1.0, training_max="300step")
    return Loop(commands={1: [germinate(seed=0), germinate(seed=1)]}, settings={"lifecycle": lifecycle, **changes}).run(4)


@pytest.mark.parametrize("clip", [0.0, 0.05])
@pytest.mark.parametrize("blueprint", ["mlp", "block"])
def test_a_branch_moves_as_under_torch_adamw_step_for_step(blueprint: str, clip: float):
    learning = BranchLearning(lr=0.02, weight_decay=0.1, betas=(0.8, 0.95), warmup=5, clip=clip)
    if blueprint == "block":
        loop = Loop("transformer", settings={"blueprint": "block", "learning": learning})
        loop.port.script = {1: [germinate("blocks.0")]}
        loop.run(1)
        bank, branch = bank_of(loop, "block"), loop.grow.registry.branches[0]
        mine = list(bank.blocks["0"].parameters())
    else:
        loop = Loop(settings={"learning": learning}, commands={1: [germinate()]}).run(1)
        bank, branch = bank_of(loop), loop.grow.registry.branches[0]
        mine = list(bank.stacks.values())
    subject = BranchOptimizer(loop.grow.registry, learning)
    copies = [nn.Parameter(p.detach().clone()) for p in mine]
    reference = torch.optim.AdamW(copies, 0.02, betas=(0.8, 0.95), weight_decay=0.1)
    draws = torch.Generator().manual_seed(0)
    for step in range(1, 12):
        for parameter, other in zip(mine, copies, strict=True):
            parameter.grad = torch.randn(parameter.shape, generator=draws)
            other.grad = parameter.grad.clone()
        if clip:
            nn.utils.clip_grad_norm_(copies, clip)
        factor = 0.5 + 0.05 * step
        reference.param_groups[0]["lr"] = 0.02 * factor * min(1.0, step / 5)
        reference.step()
        subject.step([branch], factor)
        for parameter, other in zip(mine, copies, strict=True):
            torch.testing.assert_close(parameter, other, rtol=1e-5, atol=1e-7)
            assert parameter.grad is None, "gradients are used once"


def test_rows_that_do_not_learn_never_move():
    loop = learning_alone()
    bank, (first, second) = bank_of(loop), loop.grow.registry.branches.entries
    assert int(bank.steps[second.slot]) > 0, "it has momentum to be moved by"
    before = {name: stack.detach().clone() for name, stack in bank.stacks.items()}
    moments = copy.deepcopy(bank.moments)
    for stack in bank.stacks.values():
        stack.grad = torch.ones_like(stack)
    loop.grow.branch_optimizer.step([first], 1.0)
    for name, stack in bank.stacks.items():
        assert torch.equal(stack[second.slot], before[name][second.slot])
        assert not torch.equal(stack[first.slot], before[name][first.slot])
        for now, then in zip(bank.moments[name], moments[name], strict=True):
            assert torch.equal(now[second.slot], then[second.slot])


def test_a_gradient_that_is_not_finite_moves_nothing_and_is_counted():
    loop = learning_alone()
    bank, (first, second) = bank_of(loop), loop.grow.registry.branches.entries
    before = {name: stack.detach().clone() for name, stack in bank.stacks.items()}
    for stack in bank.stacks.values():
        stack.grad = torch.ones_like(stack)
    bank.stacks["w1"].grad[first.slot, 0, 0] = float("inf")
    loop.grow.branch_optimizer.step([first, second], 1.0)
    assert loop.grow.branch_optimizer.failures == {first.id: 1}
    assert torch.equal(bank.stacks["b1"][first.slot], before["b1"][first.slot])
    assert not torch.equal(bank.stacks["b1"][second.slot], before["b1"][second.slot])
    block = Loop("transformer", settings={"blueprint": "block"}, commands={1: [germinate("blocks.0")]}).run(2)
    first_weight = next(iter(bank_of(block, "block").blocks["0"].parameters()))
    first_weight.grad = torch.full_like(first_weight, float("nan"))
    block.grow.branch_optimizer.step(block.grow.registry.branches.entries, 1.0)
    assert block.grow.branch_optimizer.failures == {0: 1}


SCHEDULES: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "lambda": lambda o: schedules.LambdaLR(o, lambda step: 0.9**step),
    "cosine": lambda o: schedules.CosineAnnealingLR(o, 20),
    "step": lambda o: schedules.StepLR(o, 3, 0.3),
    "exponential": lambda o: schedules.ExponentialLR(o, 0.8),
    "warm": lambda o: schedules.LinearLR(o, 0.1, 1.0, 5),
    "restarts": lambda o: schedules.CosineAnnealingWarmRestarts(o, 5),
    "polynomial": lambda o: schedules.PolynomialLR(o, 15),
    "chain": lambda o: schedules.SequentialLR(o, [schedules.ConstantLR(o, 0.1, 3), schedules.ExponentialLR(o, 0.9)], [4]),
    "one_cycle": lambda o: schedules.OneCycleLR(o, 0.01, total_steps=40),
    "plateau": lambda o: schedules.ReduceLROnPlateau(o, factor=0.5, patience=2),
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", list(SCHEDULES))
def test_the_rate_follows_the_hosts_schedule_times_a_warm_up_of_its_own(name: str, when: str):
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    schedule = SCHEDULES[name](optimizer) if when == "before" else None
    settings = {"learning": BranchLearning(0.02), "warmup": "4step", "lifecycle": short(readiness=1.0, training_max="90step")}
    port = Notebook({1: [germinate("0")], 6: [germinate("0", 1)]})
    grow = attach(model, loss=sample_loss, total_steps=200, optimizer=optimizer, port=port, judge=[batch()], per_site=2, **settings)
    schedule = schedule or SCHEDULES[name](optimizer)
    seen: list[Any] = []
    original = grow.branch_optimizer._move
    grow.branch_optimizer._move = lambda *a: (seen.append((a[-2].tolist(), a[-1])), original(*a))[1]  # type: ignore[method-assign]
    factors = []
    for number in range(15):
        data = batch(number=number)
        loss = sample_loss(model, data).mean()
        loss.backward()
        grow.after_backward(data, loss)
        optimizer.step()
        factors.append(optimizer.param_groups[0]["lr"] / 0.01)
        grow.tick(loss.detach())
        optimizer.zero_grad()
        schedule.step(1.0) if name == "plateau" else schedule.step()
    given = {round(factor, 12) for _, factor in seen}
    assert given == {round(factor, 12) for factor in factors[2:]}, "the factor is the host's present one"
    assert grow.branch_optimizer.learning.warmup == 4
    bank: Any = grow.registry.layers[0].bank("mlp")
    assert bank.steps.tolist() == [13.0, 8.0], "each counts its own steps, and so its own warm-up"


def test_germinating_or_any_command_changes_no_other_optimizer_state():
    lifecycle = short(training_max="300step", readiness=1.0)
    loop = Loop("mlp", settings={"lifecycle": lifecycle, "per_site": 4}, commands={1: [germinate(seed=0), germinate("fc2", 0)]}).run(6)
    select = Selector(site="fc1", seeds=[1])
    commands: list[Any] = [
        germinate(seed=1),
        ChangeStrategy(id="c", select=select, strategy="drift"),
        Cancel(id="x", select=select),
        ApplyTogether(id="t", commands=[germinate(seed=2), germinate(seed=3, blueprint="glu")]),
        PauseGrafting(id="p", select=select),
        RequestReport(id="r"),
        set_stage(S.CANCELLED, seed=2),
    ]
    kept = loop.grow.registry.branches[0]

    def state() -> dict[str, torch.Tensor]:
        host = {f"{i}.{k}": v.clone() for i, s in loop.optimizer.state_dict()["state"].items() for k, v in s.items()}
        bank = bank_of(loop)
        for name, (first, second) in bank.moments.items():
            host |= {f"{name}.m": first[kept.slot].clone(), f"{name}.v": second[kept.slot].clone()}
        return host | {"steps": bank.steps[kept.slot].clone()}

    groups = len(loop.optimizer.param_groups), len(loop.optimizer.param_groups[0]["params"])
    for command in commands:
        before = state()
        loop.grow.boundary.obey(command, loop.grow.tick_number, Measured())
        loop.grow.registry.refresh()
        after = state()
        assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before), command
    statuses = {name: status for name, (status, _) in loop.port.acks.items()}
    assert [name for name, status in statuses.items() if status == "refused"] == ["p"]
    loop.grow.boundary.obey(EmergencyStop(id="stop"), loop.grow.tick_number, Measured())
    assert groups == (len(loop.optimizer.param_groups), len(loop.optimizer.param_groups[0]["params"]))
    assert loop.port.acks["stop"] == ("applied", "")


@pytest.mark.parametrize("stage", [S.TRAINING, S.GRAFTING])
def test_four_micro_batches_equal_one_of_four_times_the_size(stage: Stage):
    parts = {step: [batch(number=4 * step + i) for i in range(4)] for step in range(40)}
    loops = []
    for accumulate in (4, 1):
        lifecycle = short(readiness=1.0 if stage is S.TRAINING else -1.0, training_max="100step", grafting_max="100step")
        loop = Loop(commands={1: [germinate()]}, accumulate=accumulate, settings={"lifecycle": lifecycle, "grafting": "linear"})
        for step in range(12):
            data = parts[step]
            whole = (torch.cat([x for x, _ in data]), torch.cat([y for _, y in data]))
            loop.step(*(data if accumulate == 4 else [whole]))
        assert loop.grow.registry.branches[0].stage is stage
        loops.append(loop)
    many, one = loops
    for name, stack in bank_of(many).stacks.items():
        torch.testing.assert_close(stack, bank_of(one).stacks[name], rtol=2e-3, atol=2e-5)
    for name, value in many.host_state().items():
        torch.testing.assert_close(value, one.host_state()[name], rtol=2e-3, atol=2e-5)


@pytest.mark.parametrize("objective", ["shadow", "reconstruction"])
def test_a_step_that_the_scaler_skips_is_no_tick_and_moves_no_branch(objective: str):
    model = HOSTS["mlp"]()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    scaler = torch.amp.GradScaler(device="cpu", init_scale=1024.0, growth_interval=1000)
    port = Notebook({1: [germinate()]})
    grow = attach(
        model, loss=sample_loss, total_steps=400, optimizer=optimizer, judge=[batch()], port=port, scaler=scaler,
        per_site=2, lifecycle=short(objective=objective),
    )  # fmt: skip

    def step(number: int, overflow: bool) -> bool:
        data = batch(number=number)
        loss = sample_loss(model, data).mean()
        scaler.scale(loss).backward()
        grow.after_backward(data, loss.detach())
        if overflow:
            model.head.weight.grad[0, 0] = float("inf")
        scaler.step(optimizer)
        scaler.update()
        ticked = grow.tick(loss.detach())
        optimizer.zero_grad()
        return ticked

    bank = None
    for number in range(30):
        overflow = number % 3 == 2
        if grow.registry.branches.entries:
            bank = grow.registry.layers[0].bank("mlp")
            before = {name: stack.detach().clone() for name, stack in bank.stacks.items()}, bank.steps.clone()
            age = grow.registry.table.age.clone(), grow.tick_number
        assert step(number, overflow) is not overflow
        if bank is not None and overflow:
            assert all(torch.equal(before[0][name], stack) for name, stack in bank.stacks.items())
            assert torch.equal(before[1], bank.steps) and torch.equal(age[0], grow.registry.table.age)
            assert grow.tick_number == age[1] and not grow.objective.pending
    assert grow.tick_number == 20
    assert grow.registry.branches[0].stage is S.GRAFTING


def test_the_loss_scale_is_undone_for_the_task_alone():
    """A branch under a scaler moves as one without: its gradients, task's and objective's, are of one size."""
    results = []
    for scale in (None, 4096.0):
        torch.manual_seed(3)
        model = HOSTS["mlp"]()
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        scaler = None if scale is None else torch.amp.GradScaler(device="cpu", init_scale=scale, growth_interval=1000)
        port = Notebook({1: [germinate()]})
        grow = attach(
            model, loss=sample_loss, total_steps=400, optimizer=optimizer, judge=[batch()], port=port, scaler=scaler, per_site=2,
            lifecycle=short(), learning=BranchLearning(0.01, clip=0.01),
        )  # fmt: skip
        for number in range(20):
            data = batch(number=number)
            loss = sample_loss(model, data).mean()
            (loss if scaler is None else scaler.scale(loss)).backward()
            grow.after_backward(data, loss.detach())
            optimizer.step() if scaler is None else (scaler.step(optimizer), scaler.update())
            grow.tick(loss.detach())
            optimizer.zero_grad()
        bank: Any = grow.registry.layers[0].bank("mlp")
        rows = [rows for tick, site, rows in port.rows if site == "fc1"]
        results.append(([stack.detach()[0] for stack in bank.stacks.values()], rows[-1][0], grow.measurements.gradient_norms[0]))
    (plain, row, norm), (scaled, scaled_row, scaled_norm) = results
    for first, second in zip(plain, scaled, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-5)
    assert scaled_norm == pytest.approx(norm, rel=1e-2)
    torch.testing.assert_close(row[6:9], scaled_row[6:9], rtol=2e-2, atol=1e-6)


class Halved:
    """A loop in half precision with a branch in GRAFTING whose gradient alone overflows: its weights out are large, in tiny."""

    def __init__(self, scale: float) -> None:
        self.model = HOSTS["mlp"]()
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.01)
        self.scaler = torch.amp.GradScaler(device="cpu", init_scale=scale, growth_interval=1000)
        self.port = Notebook({1: [germinate()]})
        self.grow = attach(
            self.model, loss=self.loss, total_steps=400, optimizer=self.optimizer, judge=[batch()], port=self.port, scaler=self.scaler,
            per_site=2, lifecycle=short(), sites="fc1",
        )  # fmt: skip
        self.number = 0
        while not any(float(alpha) > 0.1 for alpha in self.grow.registry.branches.alpha):
            self.step()
        self.branch = self.grow.registry.branches[0]
        self.bank = self.grow.registry.layers[0].bank("mlp")
        with torch.no_grad():
            self.bank.stacks["w1"][self.branch.slot] *= 1e-5
            self.bank.stacks["w2"][self.branch.slot] = 3e4
            self.bank.stacks["b1"][self.branch.slot] = 1e-6

    def loss(self, model, data):
        with torch.autocast("cpu", torch.float16):
            output = model(data[0])
        return torch.nn.functional.cross_entropy(output.float(), data[1], reduction="none")

    def step(self) -> None:
        data = batch(number=self.number)
        value = self.loss(self.model, data).mean()
        self.scaler.scale(value).backward()
        self.grow.after_backward(data, value.detach())
        self.scaler.step(self.optimizer)
        self.scaler.update()
        assert self.grow.tick(value.detach()), "the host's own gradient is finite"
        self.optimizer.zero_grad()
        self.number += 1


def test_a_gradient_that_overflows_under_a_loss_scale_is_skipped_until_it_persists():
    loop = Halved(2.0**14)
    values = {name: stack.detach().clone() for name, stack in loop.bank.stacks.items()}
    host = [p.detach().clone() for p in loop.optimizer.param_groups[0]["params"]]
    for count in range(1, PATIENCE):
        loop.step()
        assert loop.branch.stage is S.GRAFTING and loop.branch.overflows == count
        assert all(torch.equal(values[name], stack) for name, stack in loop.bank.stacks.items()), "the step was skipped"
    loop.step()
    assert loop.branch.stage is S.CULLED
    assert f"its gradient was not finite, {PATIENCE} steps in a row under a loss scale of 16384" in loop.port.transitions[-1].cause
    now = loop.optimizer.param_groups[0]["params"]
    assert all(p.isfinite().all() for p in now) and not torch.equal(host[0], now[0])


def test_a_branch_learns_on_when_the_scale_has_fallen():
    loop = Halved(2.0**14)
    taken = int(loop.bank.steps[loop.branch.slot])
    for _ in range(PATIENCE - 1):
        loop.step()
    loop.scaler.update(4.0)
    loop.step()
    assert loop.branch.overflows == 0 and loop.branch.stage is S.GRAFTING
    assert int(loop.bank.steps[loop.branch.slot]) == taken + 1


def test_a_scaled_gradient_of_a_branch_is_not_felt_by_a_loop_that_clips_all_of_the_models():
    """Under a scaler, with ``clip_grad_norm_(model.parameters())`` after unscaling, as most loops have it: the host moves as without."""
    ends = []
    for scale in (None, 2.0**14):
        model = build("mlp")
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        scaler = None if scale is None else torch.amp.GradScaler(device="cpu", init_scale=scale, growth_interval=1000)
        grow = attach(
            model, loss=sample_loss, total_steps=400, optimizer=optimizer, judge=[batch()], port=Notebook({1: [germinate()]}),
            scaler=scaler, per_site=2, lifecycle=short(),
        )  # fmt: skip
        for number in range(12):
            data = batch(number=number)
            loss = sample_loss(model, data).mean()
            (loss if scaler is None else scaler.scale(loss)).backward()
            grow.after_backward(data, loss.detach())
            if scaler is not None:
                scaler.unscale_(optimizer)
            host = optimizer.param_groups[0]["params"]
            nn.utils.clip_grad_norm_(host if scaler is None else list(model.parameters()), 0.1)
            optimizer.step() if scaler is None else (scaler.step(optimizer), scaler.update())
            grow.tick(loss.detach())
            optimizer.zero_grad()
        assert grow.registry.in_stage(S.GRAFTING)
        ends.append([p.detach() for p in model.parameters()])
    for one, other in zip(*ends, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
