"""What germinates ``as_one`` is judged by what it is worth together, moves together, and is kept or removed together."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from growing import Loop, Notebook, build, germinate, sample_loss, short

from esper.blueprints import Block
from esper.engine.attach import attach
from esper.engine.judging.judge import Gain, Judge
from esper.engine.learning.branch_optimizer import BranchLearning
from esper.grafting.config import LinearConfig
from esper.lifecycle import Stage
from esper.messages import ApplyTogether, Cancel, Germinate, Selector, SetStage

SITES = [f"blocks.{number}" for number in range(3)]


def together(*sites: str, id: str = "grow") -> ApplyTogether:
    return ApplyTogether(id=id, commands=[germinate(site) for site in sites], as_one=True)


def grown(*more: Any, **lifecycle: Any) -> Loop:
    settings = {
        "blueprint": Block(start="copy"),
        "grafting": LinearConfig(ramp="0step"),
        "learning": BranchLearning(0.003),
        "lifecycle": short(**({"training_min": "0step", "grafting_min": "4step"} | lifecycle)),
    }
    return Loop("decoder", settings=settings, commands={2: [together(*SITES)], **dict(more)})


def stages(loop: Loop) -> list[Stage]:
    return [branch.stage for branch in loop.grow.registry.branches.entries]


def test_one_look_judges_all_of_them_by_the_loss_without_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[tuple[int, float]] = []
    original = Judge.look

    def look(judge: Judge, branches: Any, errors: Any) -> list[Gain]:
        gains = original(judge, branches, errors)
        bare = copy.deepcopy(build("decoder"))
        bare.load_state_dict(loop.host_state())
        (data,) = judge.data
        with torch.no_grad():
            without = float(sample_loss(bare.eval(), data).double().mean())
        looks.append((len(branches), without - float(judge.on.mean()) - gains[0].mean))
        return gains

    monkeypatch.setattr(Judge, "look", look)
    loop = grown().run(2)
    for _ in range(40):
        loop.step()
    assert looks and all(count == 1 and abs(error) < 1e-5 for count, error in looks)
    gains = {(branch.gain, branch.bound) for branch in loop.grow.registry.branches.entries}
    assert len(gains) == 1


def test_all_of_them_change_their_stage_at_the_same_tick() -> None:
    loop = grown(stability=0.0).run(2)
    assert [branch.group for branch in loop.grow.registry.branches.entries] == [0, 0, 0]
    for _ in range(60):
        loop.step()
        assert len(set(stages(loop))) == 1
    paths = {tuple(branch.path) for branch in loop.grow.registry.branches.entries}
    assert len(paths) == 1 and len(next(iter(paths))) > 4


def test_what_removes_one_removes_all() -> None:
    cancel = (3, [Cancel(id="no", select=Selector(site="blocks.1"))])
    loop = grown(cancel, training_min="20step", training_max="30step").run(5)
    cancelled = [event.branch for event in loop.port.transitions if event.target == int(Stage.CANCELLED)]
    assert cancelled == [1, 0, 2] and loop.port.acks["no"] == ("applied", "")
    failing = grown(grafting_min="20step").run(8)
    assert stages(failing) == [Stage.GRAFTING] * 3
    failing.grow.transitions.move(failing.grow.registry.branches[1].row, Stage.CULLED, "it failed")
    assert stages(failing) == [Stage.CULLED] * 3
    causes = [event.cause for event in failing.port.transitions if event.target == int(Stage.CULLED)]
    assert causes == ["it failed", "goes with branch 1: it failed", "goes with branch 1: it failed"]
    failing.run(12)
    assert not any(branch.alive for branch in failing.grow.registry.branches.entries)
    assert torch.equal(failing.grow.registry.branches.alpha, torch.zeros(3))


def test_those_whose_time_is_over_go_once() -> None:
    loop = grown(evaluating_max="5step", gain=1e9).run(40)
    targets = [event.target for event in loop.port.transitions if event.target == int(Stage.CULLED)]
    assert len(targets) == 3


def test_a_command_to_one_moves_all_of_them_or_none() -> None:
    move = (9, [SetStage(id="on", select=Selector(site="blocks.2"), target=int(Stage.STABILIZATION))])
    early = (5, [SetStage(id="early", select=Selector(site="blocks.2"), target=int(Stage.STABILIZATION))])
    loop = grown(move, early).run(12)
    assert loop.port.acks["early"][0] == "refused"
    assert len(set(stages(loop))) == 1


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        (together(*SITES), "3 branches are to be one decision, but lifecycle.training_slots=2"),
        (ApplyTogether(id="grow", commands=[Cancel(id="a", select=Selector())], as_one=True), "no seed|can|CANCELLED"),
    ],
)
def test_what_cannot_be_one_decision_is_refused_whole(command: ApplyTogether, reason: str) -> None:
    settings: dict[str, Any] = {"blueprint": Block(start="copy"), "lifecycle": short(training_slots=2)}
    loop = Loop("decoder", settings=settings, commands={2: [command]}).run(3)
    status, said = loop.port.acks["grow"]
    assert status == "refused" and not loop.grow.registry.branches.entries
    assert any(part in said for part in reason.split("|"))


def test_they_wait_until_all_of_them_may_train() -> None:
    settings: dict[str, Any] = {"blueprint": Block(start="copy"), "lifecycle": short(training_slots=3, training_min="6step", readiness=1.0)}
    commands = {1: [germinate("blocks.0")], 2: [together("blocks.1", "blocks.2")]}
    loop = Loop("decoder", settings=settings, commands=commands).run(3)
    assert stages(loop) == [Stage.TRAINING] * 3
    settings["lifecycle"] = short(training_slots=2, training_min="6step", readiness=1.0, training_max="8step")
    loop = Loop("decoder", settings=settings, commands=commands).run(4)
    assert stages(loop) == [Stage.TRAINING, Stage.GERMINATED, Stage.GERMINATED], "one of two slots is free, and two are needed"
    assert stages(loop.run(8))[1:] == [Stage.TRAINING] * 2


def test_a_resumed_run_knows_what_is_one_decision() -> None:
    loop = grown().run(9)
    state = loop.grow.state()
    again = build("decoder")
    again.load_state_dict(loop.host_state())
    optimizer = torch.optim.AdamW(again.parameters(), 0.01)
    grow = attach(
        again, loss=sample_loss, total_steps=400, optimizer=optimizer, port=Notebook(), judge=[loop.batch(900, 64)], state=state,
        per_site=1, **{key: loop.settings[key] for key in ("blueprint", "grafting", "learning", "lifecycle")},
    )  # fmt: skip
    first, *others = grow.registry.branches.entries
    assert grow.registry.group_of(first) == [first, *others] and len(others) == 2


def test_a_germination_alone_is_a_decision_alone() -> None:
    loop = Loop("decoder", settings={"blueprint": Block()}, commands={1: [Germinate(id="a", site="blocks.0", seed=0)]}).run(2)
    (branch,) = loop.grow.registry.branches.entries
    assert branch.group == -1 and loop.grow.registry.group_of(branch) == [branch]
