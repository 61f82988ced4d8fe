"""``grafting=learned``: what has paid is chosen, in mid-graft too and without a jump of alpha; it repeats, resumes and remembers."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from growing import short
from torch import nn
from torch.nn.functional import cross_entropy

from esper import attach
from esper.controllers.heuristic import HeuristicConfig
from esper.controllers.learned_grafting import LearnedGrafting, keep_all
from esper.errors import UserError
from esper.grafting.config import LearnedConfig
from esper.lifecycle.stages import Stage
from esper.messages import Acknowledgement, ApplyTogether, ChangeStrategy, Command, GateResult, Germinate, Metrics, RunStarted, Transition
from esper.seeds import TelemetryConfig

SITE = {"name": "fc1", "seeds": 8, "blueprint": "mlp", "blueprints": {"mlp": {"parameters": 10, "macs": 10}}}


class Scripted:
    """A controller that germinates one seed a tick, without a strategy."""

    def __init__(self, together: bool = False) -> None:
        self.together, self.heard = together, 0

    def observe(self, message: Any) -> None:
        self.heard += 1

    def decide(self, tick: int) -> list[Command]:
        wish = Germinate(id=f"own-{tick}", site="fc1", seed=tick % 8, why={"because": "told"})
        return [ApplyTogether(id=f"both-{tick}", commands=[wish])] if self.together else [wish]

    def state(self) -> dict[str, Any]:
        return {"heard": self.heard}

    def load_state(self, state: dict[str, Any]) -> None:
        self.heard = state["heard"]


def learned(own: Any = None, **settings: Any) -> LearnedGrafting:
    made = LearnedGrafting(own or Scripted(), LearnedConfig(strategies=["linear", "drift"], **settings), seed=3)
    made.observe(RunStarted(tick=0, total_ticks=1000, sites=[SITE]))
    for tick in range(0, 100, 20):
        made.observe(Metrics(tick=tick, values={"validation/loss": 1.0}))
    return made


def move(made: LearnedGrafting, tick: int, seed: int, source: Stage, target: Stage, strategy: str, why: Any = None) -> None:
    parts = {"branch": seed, "source": source, "target": target, "cause": "", "blueprint": "mlp", "strategy": strategy, "why": why or {}}
    made.observe(Transition(tick=tick, site="fc1", seed=seed, **parts))


def life(made: LearnedGrafting, tick: int, pays: dict[str, float], seed: int = 0) -> str:
    """One branch from its germination to its end; it is kept with the gain that ``pays`` says of its strategy."""
    (command,) = [one for one in made.decide(tick) if isinstance(one, Germinate)]
    chosen = command.strategy
    move(made, tick, seed, Stage.DORMANT, Stage.GERMINATED, chosen, command.why)
    move(made, tick + 1, seed, Stage.TRAINING, Stage.GRAFTING, chosen)
    move(made, tick + 5, seed, Stage.GRAFTING, Stage.STABILIZATION, chosen)
    for gate in ("final_gain", "no_harm"):
        parts = {"branch": seed, "gate": gate, "value": pays[chosen], "threshold": 0.0, "passed": True}
        made.observe(GateResult(tick=tick + 6, site="fc1", seed=seed, **parts))
    move(made, tick + 6, seed, Stage.FINE_TUNING, Stage.FOSSILIZED, chosen)
    return chosen


def test_what_has_paid_is_chosen_and_the_transition_says_why():
    made = learned(rent=0.0)
    chosen = [life(made, tick, {"linear": 0.0, "drift": 0.4}) for tick in range(100, 500, 10)]
    assert set(chosen) == {"linear", "drift"}, "both are tried"
    assert chosen[-10:].count("drift") >= 9
    (command,) = made.decide(600)
    why = command.why["grafting"]
    assert command.why["because"] == "told" and why["chosen"] == command.strategy == "drift" and why["observations"] == 40
    assert why["expected"]["drift"] > 0.25 > 0.1 > why["expected"]["linear"]


def test_a_strategy_that_the_controller_names_stays_and_batches_are_filled():
    made = learned(Scripted(together=True))
    (batch,) = made.decide(101)
    assert batch.commands[0].strategy in ("linear", "drift")
    named = Germinate(id="x", site="fc1", seed=1, strategy="momentum")
    made.own.decide = lambda tick: [named]
    assert made.decide(102) == [named]
    move(made, 103, 1, Stage.DORMANT, Stage.GERMINATED, "momentum")
    assert ("fc1", 1) not in made.blending, "what another has chosen is not changed"


def test_in_mid_graft_a_branch_is_handed_to_what_pays_better_and_both_answer_for_their_share():
    made = learned(margin=0.05, rent=0.0)
    command = made.decide(101)[0]
    move(made, 101, 1, Stage.DORMANT, Stage.GERMINATED, command.strategy, command.why)
    move(made, 110, 1, Stage.TRAINING, Stage.GRAFTING, command.strategy)
    assert not [one for one in made.decide(111) if isinstance(one, ChangeStrategy)], "nothing has paid yet"
    other = {"linear": "drift", "drift": "linear"}[command.strategy]
    for _ in range(20):
        made.known.add({f"strategy={other}": 1.0, f"strategy={other} at fc1": 1.0}, 0.5)
    (change,) = [one for one in made.decide(114) if isinstance(one, ChangeStrategy)]
    assert change.strategy == other and (change.select.site, change.select.seeds) == ("fc1", [1])
    assert not [one for one in made.decide(115) if isinstance(one, ChangeStrategy)], "it is asked for once"
    made.observe(Acknowledgement(command_id=change.id, status="applied", tick=115))
    move(made, 125, 1, Stage.GRAFTING, Stage.STABILIZATION, other)
    assert made.blending["fc1", 1].shares() == pytest.approx({command.strategy: 1 / 3, other: 2 / 3})
    assert not [one for one in made.decide(130) if isinstance(one, ChangeStrategy)], "it grafts no longer"
    move(made, 140, 1, Stage.EVALUATING, Stage.CULLED, other)
    assert made.paid.n == 1 and not made.blending
    assert made.paid.A[made.paid.place[f"strategy={other}"]].max() == pytest.approx(4 / 9)


def test_it_repeats_and_resumes_to_the_bit():
    one, two = learned(), learned()
    pays = {"linear": 0.2, "drift": 0.1}
    assert [life(one, tick, pays) for tick in range(100, 200, 10)] == [life(two, tick, pays) for tick in range(100, 200, 10)]
    command = one.decide(201)[0]
    move(one, 201, 1, Stage.DORMANT, Stage.GERMINATED, command.strategy, command.why)
    again = learned()
    again.load_state(json.loads(json.dumps(one.state(), allow_nan=False)))
    assert again.state() == one.state()
    assert [life(again, tick, pays) for tick in range(210, 300, 10)] == [life(one, tick, pays) for tick in range(210, 300, 10)]


def test_a_second_run_begins_with_what_the_first_has_learnt(tmp_path: Path):
    file = tmp_path / "paid.json"
    first = learned(memory=str(file), rent=0.0)
    for tick in range(100, 400, 10):
        life(first, tick, {"linear": 0.0, "drift": 0.4})
    keep_all(first, "", tmp_path, 1000)
    second = learned(memory=str(file))
    assert second.known.n == 30 and second.paid.n == 0
    assert [second.decide(tick)[0].strategy for tick in range(10)].count("drift") >= 9


def test_bad_settings_are_refused():
    for settings, word in (({"strategies": ["learned"]}, "learned"), ({"strategies": []}, "empty"), ({"memory": "study"}, ".json")):
        with pytest.raises(UserError, match=word):
            LearnedConfig(**settings)


def test_in_a_real_run_alpha_never_jumps_when_the_strategy_changes():
    draws = torch.Generator().manual_seed(0)
    x, y = torch.randn(64, 6, generator=draws), torch.randint(0, 3, (64,), generator=draws)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))

    def loss(net: nn.Module, batch: Any) -> torch.Tensor:
        return cross_entropy(net(batch[0]), batch[1], reduction="none")

    total, ramp = 200, 20
    grafting = LearnedConfig(ramp=f"{ramp}step", strategies=["linear", "performance"], margin=0.0)
    own = HeuristicConfig(germinate_at="5step", count=1).build(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    grow = attach(
        model, total_steps=total, loss=loss, optimizer=optimizer, sites=["0"], per_site=2, judge=[(x, y)],
        lifecycle=short(grafting_max="150step"), grafting=grafting, telemetry=TelemetryConfig(every=1), controller=own,
    )  # fmt: skip
    made = grow.port.runner.controller
    assert isinstance(made, LearnedGrafting) and made.own is own
    alphas, strategies = [], []
    for _ in range(60):
        value = loss(model, (x, y)).mean()
        value.backward()
        grow.after_backward((x, y), value.detach())
        optimizer.step()
        grow.tick(value.detach())
        optimizer.zero_grad()
        branches = grow.registry.branches
        for branch in branches.living():
            if branch.stage is Stage.GRAFTING:
                alphas.append(float(branches.alpha[branch.id]))
                strategies.append(branch.strategy)
                if len(alphas) == 5:  # from here on the other strategy is known to pay
                    other = {"linear": "performance", "performance": "linear"}[branch.strategy]
                    for _ in range(50):
                        made.known.add({f"strategy={other}": 1.0, f"strategy={other} at 0": 1.0}, 0.5)
    assert len(set(strategies)) == 2 and len(alphas) > 8
    steps = [after - before for before, after in itertools.pairwise(alphas)]
    assert min(steps) >= 0.0 and max(steps) <= 2.0 / ramp + 1e-6, "performance is at most twice as fast as linear"
