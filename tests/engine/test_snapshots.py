"""A rollback puts host, optimizer and the other branches back as they were, and rewinds nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from growing import Loop, batch, germinate, same, set_stage, short

from esper.engine.extra_passes import untouched_buffers
from esper.engine.snapshot import Snapshot
from esper.lifecycle import Stage

S = Stage


def optimizer_state(loop: Loop) -> dict[str, torch.Tensor]:
    state = loop.optimizer.state_dict()["state"]
    return {f"{number}.{name}": torch.as_tensor(value).clone() for number, held in state.items() for name, value in held.items()}


def branch_rows(loop: Loop, number: int, blueprint: str) -> dict[str, torch.Tensor]:
    branch = loop.grow.registry.branches[number]
    bank: Any = loop.grow.registry.layers[branch.site].bank(blueprint)
    if blueprint == "block":
        key = str(branch.slot)
        rows = {name: value.clone() for name, value in bank.blocks[key].state_dict().items()}
        rows |= {f"{name}.{i}": m.clone() for name, pair in bank.moments[key].items() for i, m in enumerate(pair)}
        return rows | {"steps": torch.tensor(bank.steps[key])}
    rows = {name: stack.detach()[branch.slot].clone() for name, stack in bank.stacks.items()}
    rows |= {f"{name}.{i}": m[branch.slot].clone() for name, pair in bank.moments.items() for i, m in enumerate(pair)}
    return rows | {"steps": bank.steps[branch.slot].clone()}


@pytest.mark.parametrize(("host", "blueprint"), [("batch_norm", "mlp"), ("cnn_batch", "block")])
def test_a_rollback_restores_host_optimizer_and_the_other_branches(host: str, blueprint: str):
    lifecycle = short(training_min="10step", stabilization_min="9step", readiness=-1e9, judge_every="50step")
    loop = Loop(host, settings={"lifecycle": lifecycle, "blueprint": blueprint}, total=100)
    names = [site.name for site in loop.grow.registry.sites]
    loop.port.script = {1: [germinate(names[0])], 8: [germinate(names[1])]}
    loop.until(S.GRAFTING)
    last = [name for name, _ in loop.model.named_parameters() if "seed_layer" not in name][-2]
    kept = loop.host_state(), optimizer_state(loop), branch_rows(loop, 1, blueprint)
    other = loop.grow.registry.branches[1]
    assert other.stage is S.TRAINING
    loop.run(6)
    loop.optimizer.param_groups[0]["lr"] = 0.123
    with torch.no_grad():
        loop.model.get_parameter(last).neg_()
    t, path = loop.grow.tick_number, list(other.path)
    assert loop.grow.executor.apply(set_stage(S.ROLLED_BACK, names[0]), t) == ("applied", "")
    loop.grow.guard.settle(t)
    same(kept[0], loop.host_state())
    same(kept[1], optimizer_state(loop))
    assert other.stage is S.TRAINING
    same(kept[2], branch_rows(loop, 1, blueprint))
    assert loop.grow.tick_number == t and loop.optimizer.param_groups[0]["lr"] == 0.123
    assert other.path == path, "it is no transition of the other seeds"
    assert [stage for stage, _ in loop.grow.registry.branches[0].path][-1] == "ROLLED_BACK"
    loop.run(8)
    assert [stage for stage, _ in loop.grow.registry.branches[0].path][-1] == "DORMANT"
    assert loop.grow.transitions.counts["rolled_back"] == 1


def test_a_branch_that_is_not_blended_is_rolled_back_alone():
    loop = Loop(settings={"lifecycle": short(readiness=1.0)}, commands={1: [germinate()]}).run(4)
    before = loop.host_state()
    assert loop.grow.executor.apply(set_stage(S.ROLLED_BACK), loop.grow.tick_number) == ("applied", "")
    same(before, loop.host_state())


def test_a_host_that_is_not_sound_is_no_good_snapshot():
    lifecycle = short(judge_every="90step")
    loop = Loop("batch_norm", settings={"lifecycle": lifecycle}, commands={1: [germinate(seed=0)], 20: [germinate(seed=1)]})
    loop.until(S.GRAFTING)
    good = loop.grow.guard.baselines[0].kept
    assert good is not None and good.snapshot.healthy
    loop.run(21 - loop.grow.tick_number)
    with torch.no_grad():
        loop.model.norm.running_mean[0] = float("inf")  # which no training forward feels
    assert not Snapshot(loop.model, loop.optimizer, loop.grow.registry, 9).healthy
    loop.run(3)
    assert loop.grow.guard.baselines[1].kept is good, "the last good one is kept"


def test_without_a_judge_a_rollback_is_taken_at_its_word():
    loop = Loop(settings={"judge": None, "sample": batch()}, commands={1: [germinate()]})
    loop.until(S.GRAFTING)
    kept = loop.host_state()
    loop.run(3)
    loop.port.script[loop.grow.tick_number + 1] = [set_stage(S.ROLLED_BACK)]
    assert not all(torch.equal(value, loop.host_state()[name]) for name, value in kept.items()), "it had learnt since"
    loop.run(1)
    same(kept, loop.host_state())


def test_a_stabilization_that_never_settles_ends_in_a_rollback(monkeypatch: pytest.MonkeyPatch):
    lifecycle = short(stability=0.8, stabilization_max="5step")
    loop = Loop(settings={"lifecycle": lifecycle}, commands={1: [germinate()]})
    monkeypatch.setattr(loop.grow.signal, "steadiness", lambda: 0.79)
    loop.until(S.ROLLED_BACK)
    assert loop.port.stages()[-1] == ("STABILIZATION", "ROLLED_BACK")


def test_buffers_are_put_back_even_where_a_forward_exchanged_them():
    class Counting(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(1))
            self.register_buffer("nothing", None)

        def forward(self) -> None:
            self.calls = self.calls + 1

    model = Counting()
    held = model.calls
    with untouched_buffers(model):
        model()
        assert float(model.calls) == 1.0
    assert model.calls is held and float(held) == 0.0
