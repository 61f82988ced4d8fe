"""Stratified sets are disjoint, balanced and a pure function of the split seed; normalisation looks at train alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from esper.errors import UserError
from esper.tasks.base import SETS
from esper.tasks.classification import classification, correct, divide, sample_loss, stratified
from tests.examples import examples


@settings(max_examples=examples(60))
@given(
    labels=st.lists(st.integers(0, 4), min_size=8, max_size=120),
    shares=st.lists(st.integers(0, 30), min_size=1, max_size=4),
    seed=st.integers(0, 5),
)
def test_sets_are_disjoint_sized_as_asked_and_stratified(labels: list[int], shares: list[int], seed: int) -> None:
    targets = torch.tensor(labels)
    sizes = [share * len(labels) // 120 for share in shares]
    parts = stratified(targets, sizes, seed)
    assert [len(part) for part in parts] == sizes
    together = torch.cat(parts)
    assert len(together.unique()) == len(together)
    assert all(torch.equal(a, b) for a, b in zip(parts, stratified(targets, sizes, seed), strict=True))
    for part in parts:
        for label in targets.unique():
            expected = len(part) * float((targets == label).float().mean())
            kinds = len(targets.unique())
            assert abs(int((targets[part] == label).sum()) - expected) <= 1 + kinds / 2


def test_large_sets_keep_class_shares_within_two_samples() -> None:
    targets = torch.arange(1000) % 7
    for part in stratified(targets, [600, 200, 100, 100], seed=3):
        counts = targets[part].bincount(minlength=7)
        assert int(counts.max() - counts.min()) <= 2


def test_another_split_seed_makes_other_sets() -> None:
    targets = torch.arange(100) % 10
    assert not torch.equal(stratified(targets, [50], 0)[0], stratified(targets, [50], 1)[0])


def samples(count: int, shift: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    drawn = torch.Generator().manual_seed(count)
    return torch.randn(count, 2, 5, generator=drawn) * 3 + shift, torch.arange(count) % 3


def test_too_many_samples_asked_for_is_a_sentence_with_the_numbers() -> None:
    with pytest.raises(UserError, match=r"judge=60 \+ test=50 asks for 110 of 100 samples"):
        divide("toy", samples(100), 0, {"train": 0, "judge": 60, "test": 50})
    with pytest.raises(UserError, match="leaves nothing to train on"):
        divide("toy", samples(100), 0, {"train": 0, "judge": 50, "test": 50})


def test_train_alone_decides_the_normalisation() -> None:
    sets = {which: samples(60 + number, shift=10.0 * number) for number, which in enumerate(SETS)}
    task = classification("toy", sets, 3, "toy")
    train = task.train.inputs
    assert torch.allclose(train.mean((0, 2)), torch.zeros(2), atol=1e-5)
    assert torch.allclose(train.std((0, 2), correction=0), torch.ones(2), atol=1e-5)
    assert float(task.test.inputs.mean()) > 5
    louder = {**sets, "test": (sets["test"][0] * 100, sets["test"][1])}
    assert torch.equal(classification("toy", louder, 3, "toy").train.inputs, train)


def test_a_constant_channel_becomes_zero_not_nan() -> None:
    sets = dict.fromkeys(SETS, (torch.full((9, 1, 4), 7.0), torch.arange(9) % 3))
    assert torch.equal(classification("toy", sets, 3, "toy").train.inputs, torch.zeros(9, 1, 4))


def test_nan_in_the_data_names_the_set_the_count_and_the_index() -> None:
    sets = {which: samples(30) for which in SETS}
    bad = sets["judge"][0].clone()
    bad[4, 0, 1], bad[9, 1, 0], bad[9, 1, 2] = float("nan"), float("inf"), float("nan")
    sets["judge"] = (bad, sets["judge"][1])
    with pytest.raises(UserError, match=r"2 of the 30 samples in the judge set .* \(the first at index 4\)"):
        classification("toy", sets, 3, "toy")


def test_labels_out_of_range_are_refused() -> None:
    sets = {which: samples(30) for which in SETS}
    with pytest.raises(UserError, match=r"train set is empty or has labels outside 0\.\.1"):
        classification("toy", sets, 2, "toy")


def test_loss_and_accuracy_are_per_sample() -> None:
    output = torch.tensor([[2.0, 0.0], [0.0, 2.0], [0.0, 2.0]])
    batch = (torch.zeros(3, 1), torch.tensor([0, 1, 0]))
    assert correct(output, batch).tolist() == [1.0, 1.0, 0.0]
    expected = torch.tensor([0.126928, 0.126928, 2.126928])
    assert torch.allclose(sample_loss(output, batch), expected, atol=1e-5)
    assert sample_loss(output.bfloat16(), batch).dtype == torch.float32
