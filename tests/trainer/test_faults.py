"""Injected faults: the governor recovers or stops with a report, and without a fault nobody notices it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from esper.errors import UserError
from esper.grafting import STRATEGIES
from esper.lifecycle import Stage
from esper.messages import Alert, GateResult, Selector, SetStage
from esper.trainer.trainer import Trainer
from tests.checkpoint.conftest import Make, bits, train_until

SLOW = ("trainer.steps=80", "grafting.ramp=30step", "lifecycle.grafting_max=90%")


@pytest.fixture(params=["at once", "a step later"])
def guarded(request: pytest.FixtureRequest, make: Make) -> Make:
    """Makes trainers whose governor sees a step before it is made, as on a CPU, or may see it one step later, as on a GPU."""
    return make if request.param == "at once" else lambda *words, **given: judged_later(make, *words, **given)


def judged_later(make: Make, *overrides: str, **given: Any) -> Trainer:
    """A trainer as on a GPU; a step waits for its numbers every tenth time and at telemetry alone."""
    trainer = make("trainer.governor_snapshot=10step", *overrides, **given)
    for group in trainer.optimizer.param_groups:
        group["fused"] = True
    trainer.grow.readings.late = trainer.postpones = True
    return trainer


def alerts(trainer: Trainer) -> list[str]:
    return [event.text for event in trainer.port.events(Alert)]


def steps(trainer: Trainer, count: int) -> None:
    trainer.model.train()
    for _ in range(count):
        trainer.advance()


def finite(trainer: Trainer) -> bool:
    return all(bool(torch.isfinite(p).all()) for p in trainer.model.parameters())


def test_a_governor_that_has_nothing_to_do_changes_no_bit(guarded: Make) -> None:
    watched, alone = guarded(), guarded("trainer.governor=false")
    watched.fit()
    alone.fit()
    assert bits(watched) == bits(alone) and not alerts(watched)


def test_a_batch_of_nan_is_not_learned_and_harms_no_seed(guarded: Make) -> None:
    trainer = guarded(*SLOW)
    steps(trainer, 22)
    before = [branch.stage for branch in trainer.grow.registry.branches.living()]
    assert Stage.GRAFTING in before
    good = trainer._batch
    trainer._batch = lambda number: (torch.full_like(good(number)[0], float("nan")), good(number)[1])
    steps(trainer, 1)
    trainer._batch = good
    assert finite(trainer)
    steps(trainer, 1)  # the verdict on a step that was postponed
    assert finite(trainer) and len(alerts(trainer)) == 1 and "step 22: the loss is nan" in alerts(trainer)[0]
    assert [branch.stage for branch in trainer.grow.registry.branches.living()] == before
    assert trainer.grow.tick_number == 24
    trainer.fit()
    assert finite(trainer)


def test_an_exploding_branch_is_found_and_rolled_back_and_the_others_stay(guarded: Make) -> None:
    trainer = guarded(*SLOW)
    steps(trainer, 24)
    grafting = trainer.grow.registry.in_stage(Stage.GRAFTING)
    culprit, others = grafting[1], [branch for branch in grafting if branch is not grafting[1]]
    bank = trainer.grow.registry.layers[culprit.site].bank(culprit.blueprint)
    with torch.no_grad():
        bank.stacks["b2"][culprit.slot] = 1e30
    steps(trainer, 1)
    assert culprit.stage is Stage.ROLLED_BACK and not culprit.alive
    assert all(branch.stage is Stage.GRAFTING for branch in others)
    assert f"branch {culprit.id}" in alerts(trainer)[0] and finite(trainer)


def test_weights_with_a_flipped_bit_return_to_the_last_good_snapshot_with_the_optimizer(guarded: Make) -> None:
    trainer = guarded()
    steps(trainer, 30)
    assert trainer.governor is not None and trainer.governor.snapshot is not None
    weight = trainer.optimizer.param_groups[0]["params"][0]
    with torch.no_grad():
        weight.view(torch.int32).reshape(-1)[3] ^= 1 << 30
    trainer.optimizer.state[weight]["exp_avg"].fill_(float("inf"))
    steps(trainer, 3)
    assert len(alerts(trainer)) == 1 and finite(trainer)
    assert all(bool(torch.isfinite(v).all()) for s in trainer.optimizer.state.values() for v in s.values())


def test_a_host_that_returned_to_an_earlier_state_is_measured_anew(make: Make) -> None:
    """Its gradients are those of then, and the snapshot of later weights is not that of its path."""
    trainer = make()
    steps(trainer, 60)
    governor = trainer.governor
    assert governor is not None and governor.snapshot is not None and governor.bands["loss"].limit < 1e6
    before = governor.snapshot
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.mul_(0.5)
    trainer.grow.guard.on_return()
    assert governor.bands["loss"].limit == float("inf") and governor.snapshot is not before
    steps(trainer, 30)
    assert not governor.anomalies


def test_a_learning_rate_times_1000_is_undone(guarded: Make) -> None:
    trainer = guarded("trainer.steps=80")
    steps(trainer, 40)
    for group in trainer.optimizer.param_groups:
        group["initial_lr"] *= 1000.0
    steps(trainer, 1)
    for group in trainer.optimizer.param_groups:
        group["initial_lr"] /= 1000.0
    steps(trainer, 4)
    assert len(alerts(trainer)) == 1
    assert float(trainer.grow.signal.fast) < 10.0


def test_a_poisoned_gradient_is_never_applied(guarded: Make) -> None:
    trainer = guarded()
    steps(trainer, 12)
    handle = trainer.optimizer.param_groups[0]["params"][0].register_hook(lambda gradient: gradient * float("nan"))
    steps(trainer, 1)
    handle.remove()
    assert finite(trainer)
    steps(trainer, 1)
    assert finite(trainer) and len(alerts(trainer)) == 1 and "step 12: the gradient is nan" in alerts(trainer)[0]


def test_a_resumed_run_judges_the_step_that_was_postponed_before_the_checkpoint(make: Make) -> None:
    trainer = judged_later(make, *SLOW)
    steps(trainer, 22)
    good = trainer._batch
    trainer._batch = lambda number: (torch.full_like(good(number)[0], float("nan")), good(number)[1])
    resumed = judged_later(make, *SLOW, state=train_until(trainer, 23))
    assert not alerts(trainer), "it is judged one step later"
    steps(resumed, 1)
    assert len(alerts(resumed)) == 1 and "step 22: the loss is nan" in alerts(resumed)[0]


def test_failures_that_repeat_stop_the_run_with_a_report(guarded: Make) -> None:
    trainer = guarded()
    steps(trainer, 10)
    good = trainer._batch
    trainer._batch = lambda number: (good(number)[0] * float("inf"), good(number)[1])
    with pytest.raises(UserError, match=r"rolled back 6 times.*step 10: the loss is nan.*step 15"):
        steps(trainer, 20)


def test_a_run_that_is_never_healthy_is_stopped_and_not_said_to_have_been_rolled_back(make: Make) -> None:
    trainer = make()
    good = trainer._batch
    trainer._batch = lambda number: (good(number)[0] * float("nan"), good(number)[1])
    with pytest.raises(UserError, match="stopped before it had a healthy state to go back to: step 0: the loss is nan"):
        trainer.fit()


def test_a_flipped_bit_that_no_activation_feels_enters_no_snapshot(make: Make) -> None:
    trainer = make("sites.match=[fc2]")
    good = trainer._batch

    def without_first_pixel(number: int) -> tuple[torch.Tensor, torch.Tensor]:
        inputs, targets = good(number)
        return inputs.flatten(1).index_fill(1, torch.tensor([0]), 0.0).view_as(inputs), targets

    trainer._batch = without_first_pixel
    steps(trainer, 30)
    weight = trainer.optimizer.param_groups[0]["params"][0].detach()
    weight.view(torch.int32)[0, 0] ^= 1 << 30
    assert float(weight.abs().max()) > 1e30
    steps(trainer, 3)
    assert float(weight.abs().max()) < 10.0 and "the largest weight is" in alerts(trainer)[0]


def out_of_gpu() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize("ask", [out_of_gpu, lambda: torch.empty(2**60)], ids=["gpu", "cpu"])
def test_a_full_memory_stops_with_a_sentence(ask: Callable[[], Any], make: Make) -> None:
    trainer = make()

    def full(*_: object) -> None:
        ask()

    trainer.grow.after_backward = full
    with pytest.raises(UserError, match=r"memory is full at step 1, with 0 branches grown; lower trainer.batch_size"):
        trainer.fit()


def test_a_strategy_that_answers_nan_is_given_up_and_harms_nothing(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make(*SLOW)
    steps(trainer, 24)
    grafting = trainer.grow.registry.in_stage(Stage.GRAFTING)
    table = trainer.grow.registry.branches
    alphas = [float(table.alpha[branch.id]) for branch in grafting]
    assert grafting and all(0.0 < alpha < 1.0 for alpha in alphas)
    sound = STRATEGIES["linear"]

    def nan(*words: Any) -> Any:
        wish = sound.plan(*words)
        return replace(wish, advance=wish.advance * float("nan"))

    monkeypatch.setitem(STRATEGIES, "linear", replace(sound, plan=nan))
    steps(trainer, 1)
    assert all(branch.stage is Stage.CULLED for branch in grafting)
    assert all(float(table.alpha[branch.id]) <= alpha for branch, alpha in zip(grafting, alphas, strict=True)), "fading"
    monkeypatch.setitem(STRATEGIES, "linear", sound)
    trainer.fit()
    assert finite(trainer) and trainer.governor is not None and not trainer.governor.anomalies, "the governor had nothing to undo"
    (said,) = trainer.port.events(Alert)
    assert (said.tick, said.level, said.code) == (25, "error", "strategy_gave_up")
    assert said.text.startswith("grafting strategy linear gave up: a signal or its own wish is not finite; to CULLED: ")
    for branch in grafting:
        assert f"branch {branch.id} of seed {branch.seed} at {trainer.grow.registry.sites[branch.site].name}" in said.text


def test_of_many_branches_that_a_strategy_gives_up_the_first_are_named_and_all_counted(make: Make) -> None:
    trainer = make(*SLOW)
    steps(trainer, 24)
    grafting = trainer.grow.registry.in_stage(Stage.GRAFTING)
    trainer.grow.boundary.say_given_up(grafting * 5, trainer.grow.tick_number)
    (said,) = alerts(trainer)
    assert said.count(" of seed ") == 8 and said.endswith(f"and {len(grafting) * 5 - 8} more")


def test_a_controller_that_approves_everything_opens_no_gate(make: Make) -> None:
    trainer = make(*SLOW)
    asked: list[str] = []
    usual = trainer.port.commands

    def approving(tick: int) -> list[Any]:
        stages = range(int(Stage.GERMINATED), int(Stage.FOSSILIZED))
        more = [SetStage(id=f"a{tick}-{stage}", select=Selector(stage=stage), target=stage + 1) for stage in stages]
        asked.extend(command.id for command in more)
        return [*usual(tick), *more]

    trainer.port.commands = approving
    trainer.fit()
    said = [words for name, *words in trainer.port.heard if name == "acknowledge" and words[0] in asked]
    assert len(said) == len(asked) and finite(trainer)
    fossils = trainer.grow.registry.in_stage(Stage.FOSSILIZED)
    passed = {event.branch for event in trainer.port.events(GateResult) if event.gate == "final_gain" and event.passed}
    assert {branch.id for branch in fossils} <= passed, "none was kept whose last gate did not pass"
