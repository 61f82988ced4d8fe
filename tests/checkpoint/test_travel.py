"""Seeds and branches apart from their host: taken along to one of the same topology, refused by any other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from esper.errors import UserError
from tests.checkpoint.conftest import Make, train_until


def test_branches_travel_to_a_host_of_the_same_topology(make: Make, tmp_path: Path) -> None:
    first, second = make(), make("seed=7")
    train_until(first, 30)
    path = first.grow.save_branches(tmp_path)
    before = [p.detach().clone() for p in second.optimizer.param_groups[0]["params"]]
    second.grow.load_branches(path)
    assert second.grow.observer.branch_cards() == first.grow.observer.branch_cards()
    assert second.grow.tick_number == 30
    for was, now in zip(before, second.optimizer.param_groups[0]["params"], strict=True):
        assert torch.equal(was, now)
    for site, layer in enumerate(first.grow.garden.layers):
        for name, bank in first.grow.garden.banks(site).items():
            other = second.grow.garden.layers[site].bank(name)
            assert layer.name == second.grow.garden.layers[site].name
            assert all(torch.equal(bank.stacks[key], other.stacks[key]) for key in bank.stacks)
    second.model.train()
    second.advance()
    assert torch.isfinite(second.grow.export()(second.validation.batch(0, 0)[0])).all()


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("model.width=8",), "the host's 'fc1.bias' is float32"),
        (("sites.per_site=3",), "it has a site"),
        (("sites.match=[fc1]",), "sites and this run"),
        (("lifecycle.objective=reconstruction",), "its silent is True and this run's False"),
    ],
)
def test_another_topology_is_refused_before_anything_is_loaded(make: Make, tmp_path: Path, words: tuple[str, ...], reason: str) -> None:
    path = make().grow.save_branches(tmp_path)
    other = make(*words)
    with pytest.raises(UserError, match="does not fit this run") as refusal:
        other.grow.load_branches(path)
    assert reason in str(refusal.value) or ("site" in reason and "site" in str(refusal.value))
    assert other.grow.tick_number == 0
