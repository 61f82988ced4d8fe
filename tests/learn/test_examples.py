"""What a policy learns from: decisions of recorded runs, and rewards that nothing but a useful branch earns."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from esper.controllers.policy.network import GERMINATE, STOP, WAIT
from esper.learn.examples import RENT, Example, Replay
from esper.learn.recorded import Tick
from esper.lifecycle.stages import Stage
from esper.messages import GateResult, Metrics, RunStarted, Telemetry, Transition

TOTAL = 1000
COLUMNS = ["stage", "alpha", "mean", "variance", "near_zero", "correlation"]
ADDS = {"mlp": {"parameters": 100, "macs": 100}}


class Story:
    """A recorded run of two sites of two seeds, told tick by tick; ``silent`` is the share of silent units at each site."""

    def __init__(self, silent: tuple[float, float] = (0.1, 0.6)) -> None:
        card = {"width": 16, "seeds": 2, "blueprint": "mlp", "blueprints": ADDS, "host_parameters": 1000, "telemetry_every": 10}
        self.begun = RunStarted(tick=0, total_ticks=TOTAL, sites=[card | {"name": name} for name in ("a", "b")])
        self.silent = dict(zip(("a", "b"), silent, strict=True))
        self.events: dict[int, list[Any]] = {}
        self.alphas: dict[tuple[str, int], dict[int, float]] = {}
        self.stages: dict[tuple[str, int], Stage] = {}

    def add(self, event: Any) -> None:
        self.events.setdefault(event.tick, []).append(event)

    def losses(self, curve: dict[int, float]) -> Story:
        for tick, value in curve.items():
            self.add(Metrics(tick=tick, values={"validation/loss": value}))
        return self

    def move(self, tick: int, place: tuple[str, int], target: Stage, cause: str = "gate passed") -> Story:
        source = self.stages.get(place, Stage.DORMANT)
        self.stages[place] = target
        said = {"blueprint": "mlp", "strategy": "linear", "objective": "shadow", "cause": cause}
        self.add(Transition(tick=tick, site=place[0], seed=place[1], branch=0, source=source, target=target, **said))
        return self

    def life(
        self, born: int = 101, blending: int = 120, full: int = 140, end: int = 300, place: tuple[str, int] = ("a", 0), **gates: float
    ) -> Story:
        """A branch that a controller germinates and that is kept, with these answers of the gates at its end."""
        self.move(born, place, Stage.GERMINATED, f"command controller-{born - 1}-0").move(blending, place, Stage.GRAFTING)
        self.alphas[place] = {full: 1.0}
        for gate, value in gates.items():
            self.add(GateResult(tick=end, site=place[0], seed=place[1], branch=0, gate=gate, value=value, threshold=0.0, passed=True))
        return self.move(end, place, Stage.FOSSILIZED)

    def ticks(self) -> list[Tick]:
        made = []
        for tick in range(10, TOTAL + 1, 10):
            for between in range(tick - 9, tick):
                if between in self.events:
                    made.append((between, self.events[between], []))
            made.append((tick, self.events.get(tick, []), [self._telemetry(tick, name) for name in ("a", "b")]))
        return made

    def _telemetry(self, tick: int, site: str) -> Telemetry:
        rows = np.zeros((1, 2, len(COLUMNS)), "<f4")
        rows[..., 3], rows[..., 4] = 1.0, self.silent[site]
        for seed in range(2):
            known = [value for since, value in self.alphas.get((site, seed), {}).items() if since <= tick]
            rows[0, seed, 1] = known[-1] if known else 0.0
        return Telemetry(site=site, ticks=[tick], seeds=2, columns=COLUMNS, data=rows.tobytes())

    def examples(self, kind: int) -> list[Example]:
        return [one for one in Replay(self.begun).of(self.ticks()) if one.kind == kind]


def flat(value: float = 1.0) -> dict[int, float]:
    return dict.fromkeys(range(0, 121, 20), value)


def rewarded(story: Story) -> float:
    """The reward of the one germination."""
    (one,) = story.examples(GERMINATE)
    return one.reward


def test_a_germination_is_seen_as_it_was_and_paid_at_the_end_of_its_life():
    (one,) = Story().losses(flat()).life(final_gain=0.2, no_harm=0.3).examples(GERMINATE)
    assert (one.site, one.seed, one.words) == (0, 0, ("mlp", "linear", "shadow")) and one.seed_may.tolist() == [True, True]
    assert one.situation.run[0] == pytest.approx(0.1), "as it was before the tick of the germination"
    assert one.reward == pytest.approx(0.2 / 1.2 - RENT * 39 / TOTAL)


def test_where_nothing_was_done_it_waited():
    waits = Story().losses(flat()).life(final_gain=0.2, no_harm=0.3).examples(WAIT)
    assert len(waits) == 20 and all(one.reward == 0.0 for one in waits)
    (living,) = [one for one in waits if one.situation.run[0] == pytest.approx(0.15)]
    assert living.rest.tolist() == pytest.approx([0.2 / 1.2]), "the branch is whole by then, and owes no more rent"


def test_a_stop_by_the_controller_is_a_decision_and_nobody_knows_what_the_branch_would_have_earned():
    story = Story().losses(flat()).move(101, ("a", 0), Stage.GERMINATED, "command controller-100-0")
    story.move(110, ("a", 0), Stage.TRAINING).move(151, ("a", 0), Stage.CANCELLED, "command controller-150-0")
    (stop,) = story.examples(STOP)
    assert stop.branch == 0 and math.isnan(stop.reward) and np.isnan(stop.rest).all()
    (grown,) = story.examples(GERMINATE)
    assert grown.reward == pytest.approx(-RENT * 50 / TOTAL), "a branch that is not kept has gained nothing"


def test_what_ends_by_itself_or_grows_by_a_persons_command_is_no_decision():
    story = Story().losses(flat()).move(101, ("a", 0), Stage.GERMINATED, "command by-hand")
    story.move(110, ("a", 0), Stage.TRAINING).move(151, ("a", 0), Stage.CULLED, "training_max")
    assert not story.examples(STOP) and not story.examples(GERMINATE)


# --- gaming ---


def test_the_hosts_own_learning_earns_nothing():
    falling = {tick: 2.0 * 0.995**tick for tick in range(0, 301, 20)}
    assert rewarded(Story().losses(falling).life(final_gain=0.0, no_harm=0.7)) < 0.0


def test_a_host_that_leans_on_a_useless_branch_earns_it_nothing():
    assert rewarded(Story().losses(flat()).life(final_gain=0.8, no_harm=0.0)) < 0.0
    useful = rewarded(Story().losses(flat()).life(final_gain=0.2, no_harm=0.2))
    assert useful > 5 * rewarded(Story().losses(flat()).life(final_gain=0.8, no_harm=0.01))


def test_squatting_at_small_alpha_costs_rent_until_the_run_ends():
    story = Story().losses(flat()).move(101, ("a", 0), Stage.GERMINATED, "command controller-100-0").move(110, ("a", 0), Stage.GRAFTING)
    story.alphas["a", 0] = {120: 0.02}
    story.add(GateResult(tick=990, site="a", seed=0, branch=0, gate="gain", value=0.5, threshold=0.0, passed=True))
    assert rewarded(story) == pytest.approx(-RENT * (19 + 0.98 * 880) / TOTAL)


def test_an_early_fossil_earns_no_more_than_a_late_one_of_the_same_share():
    early, late = (rewarded(Story().losses(flat(size)).life(final_gain=0.1 * size, no_harm=0.1 * size)) for size in (2.0, 0.4))
    assert early == pytest.approx(late)
    fast = {0: 2.3, 20: 1.9, 40: 1.6, 60: 1.4, 80: 1.25, 100: 1.15, 120: 1.1}
    learning = rewarded(Story().losses(fast).life(born=41, blending=60, full=80, final_gain=0.4, no_harm=0.5))
    assert learning < 0.85 * 0.4 / 1.5, "the host was learning by itself"


def test_stopping_a_branch_that_gains_is_worth_less_than_nothing_and_one_that_never_will_more():
    """A stop is weighed by what its branch was expected to earn, so a policy gains nothing by stopping what it was wrong to grow late."""
    import torch

    from esper.learn.training import returns, tensors, words_of

    story = Story().losses(flat()).life(final_gain=0.2, no_harm=0.3, place=("b", 0))
    story.move(102, ("a", 0), Stage.GERMINATED, "command controller-101-0").move(151, ("a", 0), Stage.CANCELLED, "command controller-150-0")
    examples = Replay(story.begun).of(story.ticks())
    data = tensors(examples, words_of(examples))
    (row,) = (data.kind == STOP).nonzero().flatten().tolist()
    rest = torch.full(data.rest.shape, 0.3)
    assert returns(data, rest)[row] == pytest.approx(-0.3) and returns(data, -rest)[row] == pytest.approx(0.3)
