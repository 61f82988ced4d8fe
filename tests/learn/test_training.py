"""Training: what was done is imitated, and what paid is done more often afterwards."""

from __future__ import annotations

import random
from functools import cache

import pytest
import torch

from esper.controllers.policy.network import GERMINATE
from esper.controllers.policy.weights import packed
from esper.learn import training
from esper.learn.examples import Example, Replay
from tests.learn.test_examples import Story, flat

pytestmark = pytest.mark.slow

QUIET = {"runs": 1.0, "decisions": 1.0, "error": 0.1, "rent": 0.02, "trend": 0.5}


@cache
def taught(useless: bool = False) -> tuple[list[Example], training.Data, tuple[training.PolicyNetwork, training.PolicyNetwork]]:
    """Twelve runs that grew at a site drawn by lot: a branch gains where most units are silent, be it the first site or the second.

    At the other one the host comes to lean on the branch (``useless``), or the judge finds nothing.
    """
    lot = random.Random(0)
    examples: list[Example] = []
    for number in range(12):
        needy = number % 2
        story = Story((0.1, 0.6) if needy else (0.6, 0.1)).losses(flat())
        for count, born in enumerate((101, 161)):
            site = lot.randrange(2)
            leaning = 0.9 if useless else 0.0
            gain, fall = (0.3, 0.4) if site == needy else (leaning, 0.0)
            story.life(born, born + 19, born + 39, born + 200, ("ab"[site], count), final_gain=gain, no_harm=fall)
        examples += Replay(story.begun).of(story.ticks())
    words = training.words_of(examples)
    data = training.tensors(examples, words)
    return examples, data, training.train(data, words, 0)


def share_of_the_needy(network: training.PolicyNetwork, examples: list[Example], data: training.Data) -> float:
    """The mean probability of the site at which most units are silent, where something germinated."""
    with torch.no_grad():
        sites, _ = network.encode(data.sights)
        chances = network.site(sites, data.sights.open).exp()
    near = torch.tensor([int(one.situation.site[1, 1] > one.situation.site[0, 1]) for one in examples])
    return float(chances.gather(1, near[:, None]).squeeze(1)[data.kind == GERMINATE].mean())


@pytest.mark.parametrize("useless", [False, True], ids=["nothing elsewhere", "the host leans on it elsewhere"])
def test_imitation_does_what_was_done_and_improvement_what_paid(useless: bool):
    examples, data, (imitating, improved) = taught(useless)
    assert share_of_the_needy(imitating, examples, data) < 0.8
    assert share_of_the_needy(improved, examples, data) > 0.9


def test_it_predicts_what_a_germination_earns():
    _, data, (_, improved) = taught()
    with torch.no_grad():
        predicted = improved.promised(data.sights.rows(data.grown), data.growths)
    error = (predicted - data.reward[data.grown]).square().mean().sqrt()
    assert error < 0.3 * data.reward[data.grown].std(), "much better than the mean"


def test_imitation_is_likelier_than_chance_and_what_paid_weighs_more():
    _, data, (imitating, improved) = taught()
    held = training.held_out(imitating, improved, data, float(data.reward[data.grown].mean()))
    assert held.uniform < held.imitated < 0.0 and held.error < held.mean_error
    weights = training.weights(imitating, data)
    assert weights.mean() == pytest.approx(1.0)
    assert weights[data.grown][data.reward[data.grown] > 0.1].mean() > 2 * weights[data.grown][data.reward[data.grown] < 0.1].mean()


def test_the_same_decisions_and_seed_lead_to_the_same_bytes_and_nothing_global_is_drawn():
    _, data, _ = taught()
    words, before = training.words_of(taught()[0]), torch.get_rng_state()
    few = {"IMITATION": 3, "IMPROVEMENT": 3}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in few.items():
            patch.setattr(training, name, value)
        first, again, other = (packed(training.train(data, words, seed)[1], QUIET).data for seed in (0, 0, 1))
    assert first == again and first != other and torch.equal(torch.get_rng_state(), before)
