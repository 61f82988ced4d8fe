"""Commands: refused with the reason in words, all or nothing, and undone when something breaks halfway."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from growing import Loop, germinate, same, set_stage, short

from esper.blueprints import Block, Conv
from esper.lifecycle import Stage
from esper.messages import (
    ApplyEach,
    ApplyTogether,
    Cancel,
    ChangeStrategy,
    Decided,
    EmergencyStop,
    Germinate,
    PauseGrafting,
    Predicate,
    RequestReport,
    ResumeGrafting,
    Selector,
    SetStage,
)

S = Stage


def picture(loop: Loop) -> dict[str, Any]:
    """Everything that a refused command must leave alone."""
    registry = loop.grow.registry
    state: dict[str, Any] = {f"table.{name}": value.clone() for name, value in registry.table.columns.items()}
    state |= {f"branches.{name}": getattr(registry.branches, name).clone() for name in ("alpha", "fade_from", "grafting")}
    state |= {f"model.{name}": value.clone() for name, value in loop.model.state_dict().items()}
    for number in range(len(registry.sites)):
        for name, bank in registry.banks(number).items():
            used = list(bank.blocks) if name == "block" else list(bank.used)
            state[f"{number}.{name}"] = (used, str(bank.steps))
    cards = [{k: str(v) for k, v in card.items()} for card in loop.grow.observer.branch_cards()]
    alive = [branch.alive for branch in registry.branches.entries]
    counts, readiness = dict(loop.grow.transitions.counts), dict(loop.grow.objective.readiness)
    state["rest"] = (loop.grow.observer.seed_cards(), cards, alive, counts, readiness, len(loop.port.transitions))
    return state


def unchanged(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert before.keys() == after.keys()
    for key, value in before.items():
        if isinstance(value, torch.Tensor):
            same({key: value}, {key: after[key]})
        else:
            assert value == after[key], key


@pytest.fixture
def loop() -> Loop:
    """Two branches at fc1, the first GRAFTING and the second TRAINING; fc2 is dormant."""
    made = Loop(settings={"lifecycle": short()}, commands={1: [germinate(seed=0)], 5: [germinate(seed=1)]}).run(6)
    assert [branch.stage for branch in made.grow.registry.branches.entries] == [S.GRAFTING, S.TRAINING]
    return made


FC1, BOTH = Selector(site="fc1", seeds=[0]), Selector(site="fc1")
REFUSED: dict[str, tuple[Any, str]] = {
    "no site": (Germinate(id="c", site="fc9", seed=0), "no site 'fc9'; there are fc1, fc2"),
    "no seed": (Germinate(id="c", site="fc1", seed=2), "seeds 0 to 1, not 2"),
    "negative seed": (Germinate(id="c", site="fc1", seed=-1), "seeds 0 to 1"),
    "taken": (Germinate(id="c", site="fc1", seed=0), "GRAFTING cannot become GERMINATED"),
    "no blueprint": (Germinate(id="c", site="fc2", seed=0, blueprint="moss"), "no blueprint 'moss'; there are affine"),
    "misfit": (Germinate(id="c", site="fc2", seed=0, blueprint="conv"), "convolution"),
    "no strategy": (Germinate(id="c", site="fc2", seed=0, strategy="hope"), "no grafting strategy 'hope'; there are linear"),
    "wrong stage": (set_stage(S.FOSSILIZED), "GRAFTING cannot become FOSSILIZED; possible next stages"),
    "germinate by stage": (set_stage(S.GERMINATED, "fc2"), "by the command Germinate"),
    "no stage": (SetStage(id="c", select=FC1, target=11), "stages are 0 to 10"),
    "too young": (set_stage(S.CULLED, seed=1), "lasts at least 2"),
    "gate": (set_stage(S.GRAFTING, seed=1), ""),
    "cancel": (Cancel(id="c", select=FC1), "GRAFTING cannot become CANCELLED"),
    "no match": (Cancel(id="c", select=Selector(site="conv*")), "no site matches 'conv*'; there are fc1, fc2"),
    "no such seed": (Cancel(id="c", select=Selector(site="fc1", seeds=[0, 7])), "not 7"),
    "nobody": (Cancel(id="c", select=Selector(site="fc*", stage=int(S.FOSSILIZED))), "no seed meets the selection"),
    "one of two": (PauseGrafting(id="c", select=BOTH), "is TRAINING; this command needs GRAFTING"),
    "resume": (ResumeGrafting(id="c", select=Selector(site="fc2", seeds=[0])), "needs GRAFTING"),
    "strategy": (ChangeStrategy(id="c", select=FC1, strategy="hope"), "no grafting strategy"),
    "strategy of none": (ChangeStrategy(id="c", select=Selector(site="fc2"), strategy="drift"), "needs GERMINATED or TRAINING or GRAFTING"),
    "predicate": (Cancel(id="c", select=Selector(where=[Predicate("age", "~", 1.0)])), "'age ~' is no predicate; columns: stage"),
    "column": (Cancel(id="c", select=Selector(where=[Predicate("luck", ">", 1.0)])), "columns: stage, alpha"),
    "unknown": (Decided(id="c", tick=1), "knows no command Decided"),
    "twice": (ApplyTogether(id="c", commands=[germinate("fc2", 0), germinate("fc2", 0)]), "GERMINATED cannot become GERMINATED"),
    "second fails": (ApplyTogether(id="c", commands=[germinate("fc2", 0), Cancel(id="x", select=FC1)]), "GRAFTING cannot"),
    "own deadline": (
        ApplyTogether(id="c", commands=[germinate("fc2", 0), Germinate(id="x", site="fc2", seed=1, deadline=9999)]),
        "the command 'x' in an ApplyTogether has a deadline of its own, but all of them come and end together: give the deadline to",
    ),
    "own priority": (
        ApplyTogether(id="c", priority=3, commands=[Germinate(id="x", site="fc2", seed=1, priority=3)]),
        "the command 'x' in an ApplyTogether has a priority of its own",
    ),
    "empty": (ApplyTogether(id="c", commands=[]), "an ApplyTogether has 1 to 1000 commands in it, and this one has 0"),
    "none of each": (ApplyEach(id="c", commands=[]), "an ApplyEach has 1 to 1000 commands in it, and this one has 0"),
    "too many": (ApplyTogether(id="c", commands=[germinate("fc2", 0)] * 1001), "this one has 1001: leave it out, or send several"),
    "too many of each": (ApplyEach(id="c", commands=[germinate("fc2", 0)] * 1001), "this one has 1001"),
}  # fmt: skip


@pytest.mark.parametrize("name", list(REFUSED))
def test_a_refused_command_says_why_and_changes_nothing(name: str, loop: Loop):
    command, reason = REFUSED[name]
    before = picture(loop)
    status, said = loop.grow.executor.apply(command, loop.grow.tick_number)
    loop.grow.registry.refresh()
    if name == "gate":  # the one whose gate is open by now
        assert status == "refused" and "lasts at least" in said
    assert status == "refused" and reason in said
    unchanged(before, picture(loop))
    assert loop.grow.executor.refusals == {said: 1}


def test_a_batch_of_each_does_what_it_can_and_names_the_rest(loop: Loop):
    row = loop.grow.registry.row("fc2", 0)
    batch = ApplyEach(
        id="c",
        commands=[Cancel(id="a", select=FC1), germinate("fc2", 0), Germinate(id="x", site="fc2", seed=1, priority=3)],
    )
    status, said = loop.grow.executor.apply(batch, loop.grow.tick_number)
    assert status == "applied" and loop.grow.registry.table.stage[row] == S.GERMINATED
    assert said.startswith("2 of 3 were refused: 'a': ") and "; 'x': the command 'x' in an ApplyEach has a priority of its own" in said
    assert sum(loop.grow.executor.refusals.values()) == 2
    before = picture(loop)
    status, said = loop.grow.executor.apply(ApplyEach(id="d", commands=[Cancel(id="a", select=FC1)]), loop.grow.tick_number)
    assert status == "refused" and said.startswith("1 of 1 were refused: 'a': ")
    unchanged(before, picture(loop))
    assert loop.grow.executor.apply(ApplyEach(id="e", commands=[germinate("fc2", 1)]), loop.grow.tick_number) == ("applied", "")


def test_a_gate_that_is_shut_refuses_a_command_too():
    loop = Loop(settings={"lifecycle": short(readiness=1.0)}, commands={1: [germinate()]}).run(8)
    status, reason = loop.grow.executor.apply(set_stage(S.GRAFTING), loop.grow.tick_number)
    assert status == "refused" and reason == "the gate 'readiness' before GRAFTING is not open"


def test_an_open_gate_lets_a_command_pass():
    loop = Loop(settings={"lifecycle": short(evaluating_min="5step", gain=0.0)}, commands={1: [germinate()]})
    branch = loop.until(S.EVALUATING)
    loop.run(4)
    loop.port.script[loop.grow.tick_number + 1] = [set_stage(S.FINE_TUNING)]
    looks = int(loop.grow.registry.table.looks[branch.row])
    loop.run(1)
    status, reason = loop.port.acks["FINE_TUNING-fc1-0"]
    assert (status == "applied") == (branch.bound > 0.0), reason
    assert int(loop.grow.registry.table.looks[branch.row]) > looks, "a look by command is a look"


def test_together_all_are_done_in_order(loop: Loop):
    together = ApplyTogether(
        id="t",
        commands=[
            Cancel(id="1", select=Selector(site="fc1", seeds=[1])),
            germinate("fc2", 0),
            germinate("fc2", 1, blueprint="glu", strategy="drift"),
            Cancel(id="2", select=Selector(site="fc2", seeds=[0])),
            PauseGrafting(id="3", select=FC1),
            ChangeStrategy(id="4", select=Selector(site="fc2", seeds=[1]), strategy="momentum"),
        ],
    )
    assert loop.grow.executor.apply(together, loop.grow.tick_number) == ("applied", "")
    registry = loop.grow.registry
    assert [b.stage for b in registry.branches.entries] == [S.GRAFTING, S.CANCELLED, S.CANCELLED, S.GERMINATED]
    assert registry.branches[3].strategy == "momentum" and bool(registry.table.paused[0])
    assert loop.port.stages()[-4:] == [
        ("TRAINING", "CANCELLED"), ("DORMANT", "GERMINATED"), ("DORMANT", "GERMINATED"), ("GERMINATED", "CANCELLED"),
    ]  # fmt: skip


@pytest.mark.parametrize("where", ["germinate", "move", "add", "report"])
def test_an_exception_halfway_is_undone(where: str, monkeypatch: pytest.MonkeyPatch):
    lifecycle = short(stabilization_min="20step")
    loop = Loop(settings={"lifecycle": lifecycle}, commands={1: [germinate(seed=0)], 22: [germinate(seed=1)]})
    loop.until(S.STABILIZATION)
    assert [branch.stage for branch in loop.grow.registry.branches.entries] == [S.STABILIZATION, S.TRAINING]
    together = ApplyTogether(
        id="t",
        commands=[
            set_stage(S.ROLLED_BACK, seed=0),
            germinate("fc2", 0),
            Cancel(id="x", select=Selector(site="fc1", seeds=[1])),
            germinate("fc2", 1, blueprint="glu"),
        ],
    )
    before = picture(loop)
    calls: list[str] = []
    targets: dict[str, tuple[Any, str, int]] = {
        "germinate": (loop.grow.registry, "germinate", 2),
        "move": (loop.grow.transitions, "move", 2),
        "add": (loop.grow.registry.branches, "add", 2),
        "report": (loop.grow.transitions, "_say", 4),
    }
    target, name, which = targets[where]
    original = getattr(target, name)

    def breaking(*arguments: Any, **settings: Any) -> Any:
        calls.append(name)
        if len(calls) == which:
            raise RuntimeError("out of memory")
        return original(*arguments, **settings)

    monkeypatch.setattr(target, name, breaking)
    with pytest.raises(RuntimeError, match="out of memory"):
        loop.grow.executor.apply(together, loop.grow.tick_number)
    monkeypatch.undo()
    loop.grow.registry.refresh()
    unchanged(before, picture(loop))
    assert loop.grow.transitions.leaving == []
    assert loop.grow.executor.apply(together, loop.grow.tick_number) == ("applied", ""), "afterwards it can be tried again"
    loop.run(3)


def test_what_the_user_can_mend_is_a_refusal_not_a_crash():
    loop = Loop("transformer", settings={"blueprint": Block(start="copy")})
    loop.grow.registry.blueprints["block"] = Block(start="fresh", output_layers=["nowhere"])
    status, reason = loop.grow.executor.apply(germinate("blocks.0"), 0)
    assert status == "refused" and "no layer 'nowhere'" in reason
    loop.grow.registry.blueprints["block"] = broken = Block(start="fresh")
    broken.silencing_misfit = lambda block: None if not calls.append(1) and len(calls) < 2 else "no luck"  # type: ignore[method-assign]
    calls: list[int] = []
    assert loop.grow.executor.apply(germinate("blocks.0"), 0) == ("refused", "no luck.")
    assert loop.grow.registry.branches.entries == [] and "block" not in loop.grow.registry.banks(0)


def test_a_block_and_a_convolution_say_where_they_fit():
    loop = Loop("cnn_group", settings={"blueprint": Conv()})
    site = loop.grow.registry.sites[0].name
    status, reason = loop.grow.executor.apply(germinate(site, blueprint="block"), 0)
    assert status == "refused" and "residual block" in reason
    blocks = Loop("cnn_group", settings={"sites": ["stages.*.blocks.0"], "per_site": 2})
    status, reason = blocks.grow.executor.apply(germinate("stages.0.blocks.0", blueprint="block"), 0)
    assert status == "refused" and "2 seeds share this one" in reason


def test_an_emergency_stop_ends_everything_but_fossils_now():
    loop = Loop(settings={"per_site": 2, "lifecycle": short(fade="4step")}, commands={1: [germinate("fc1", 0)]})
    fossil = loop.until(S.FOSSILIZED)
    t = loop.grow.tick_number
    loop.port.script |= {t + 1: [germinate("fc1", 1)], t + 7: [germinate("fc2", 0)], t + 8: [germinate("fc2", 1)]}
    loop.run(8)
    loop.port.script[loop.grow.tick_number + 1] = [EmergencyStop(id="stop", reason="smoke")]
    loop.run(1)
    stages = [branch.stage for branch in loop.grow.registry.branches.entries]
    assert stages == [S.FOSSILIZED, S.CULLED, S.CANCELLED, S.CANCELLED] and fossil.alive
    loop.run(10)
    assert [branch.id for branch in loop.grow.registry.branches.living()] == [fossil.id]
    assert all(not any(bank.used) for bank in loop.grow.registry.banks(1).values())


STOPS = {
    "a site": (Selector(site="fc1"), [S.CULLED, S.CANCELLED, S.GERMINATED]),
    "a seed": (Selector(site="fc1", seeds=[1]), [S.GRAFTING, S.CANCELLED, S.GERMINATED]),
    "a stage": (Selector(stage=int(S.TRAINING)), [S.GRAFTING, S.CANCELLED, S.GERMINATED]),
    "everything": (Selector(), [S.CULLED, S.CANCELLED, S.CANCELLED]),
    "a seed where nothing grows": (Selector(site="fc2", seeds=[1]), [S.GRAFTING, S.TRAINING, S.GERMINATED]),
}


@pytest.mark.parametrize("name", list(STOPS))
def test_an_emergency_stop_of_some_ends_those_and_no_others(name: str, loop: Loop):
    select, stages = STOPS[name]
    loop.port.script[loop.grow.tick_number + 1] = [germinate("fc2", 0)]
    loop.run(1)
    assert loop.grow.executor.apply(EmergencyStop(id="stop", select=select), loop.grow.tick_number) == ("applied", "")
    assert [branch.stage for branch in loop.grow.registry.branches.entries] == stages


@pytest.mark.parametrize(
    ("select", "reason"),
    [(Selector(site="fc9"), "no site matches 'fc9'; there are fc1, fc2"), (Selector(site="fc1", seeds=[0, 2]), "seeds 0 to 1, not 2")],
)
def test_an_emergency_stop_of_what_is_not_there_is_refused_and_stops_nothing(select: Selector, reason: str, loop: Loop):
    before = picture(loop)
    status, said = loop.grow.executor.apply(EmergencyStop(id="stop", select=select), loop.grow.tick_number)
    assert status == "refused" and reason in said
    unchanged(before, picture(loop))


def test_a_report_is_answered(loop: Loop):
    loop.port.script[loop.grow.tick_number + 1] = [RequestReport(id="r")]
    loop.run(1)
    (report,) = loop.port.reports
    assert (report.tick, report.command_id) == (loop.grow.tick_number, "r")
    assert report.stages["GRAFTING"] >= 1 and len(report.branches) == 2
    assert loop.port.acks["r"] == ("applied", "")
    assert [(card["site"], card["seed"], card["stage"]) for card in report.seeds] == [("fc1", 0, "GRAFTING"), ("fc1", 1, "TRAINING")]
    assert report.seeds[0]["last"] == [
        [1, "DORMANT", "GERMINATED", 0, "command germinate-fc1-0"],
        [2, "GERMINATED", "TRAINING", 0, "a training slot is free"],
        [4, "TRAINING", "GRAFTING", 0, "gate passed"],
    ]


def test_a_paused_ramp_goes_on_from_where_it_stood(loop: Loop):
    registry = loop.grow.registry
    t = loop.grow.tick_number
    loop.port.script |= {t + 3: [PauseGrafting(id="p", select=FC1)], t + 9: [ResumeGrafting(id="r", select=FC1)]}
    seen = []
    for _ in range(14):
        loop.step()
        seen.append(float(registry.branches.alpha[0]))
    steps = torch.tensor(seen).diff()
    assert bool((steps[3:8] == 0).all()) and int((steps == 0).sum()) == 6
    assert bool((steps[steps != 0] - 0.05).abs().max() < 1e-6), "no jump"


def test_a_strategy_changed_midway_goes_on_from_the_present_alpha(loop: Loop):
    registry = loop.grow.registry
    before = float(registry.branches.alpha[0])
    command = ChangeStrategy(id="c", select=FC1, strategy="momentum")
    assert loop.grow.executor.apply(command, loop.grow.tick_number) == ("applied", "")
    assert registry.branches[0].strategy == "momentum"
    loop.run(1)
    assert before <= float(registry.branches.alpha[0]) < before + 0.2


def test_predicates_select_by_what_telemetry_said(loop: Loop):
    loop.run(5)
    select = Selector(where=[Predicate("stage", "==", float(S.DORMANT)), Predicate("age", ">", 3.0), Predicate("alpha", "<", 0.5)])
    rows = loop.grow.executor._select(select, loop.grow.transitions.machine.trial())
    assert rows == [2, 3]
    nothing = Selector(where=[Predicate("gain", ">=", 0.0)])
    assert loop.grow.executor.apply(Cancel(id="c", select=nothing), 6)[1] == "no seed meets the selection", "NaN compares with nothing"
