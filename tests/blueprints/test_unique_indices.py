"""Sums into places that are all different go the direct way, with the bits of torch's own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from esper.blueprints.unique_indices import SelectSlots, select_slots, unique_indices

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def deterministic() -> Iterator[None]:
    """As a run has it."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("way", [select_slots, SelectSlots.apply])
def test_rows_and_their_gradient_have_the_bits_of_indexing(way, deterministic: None) -> None:
    draws = torch.Generator().manual_seed(0)
    stack = torch.randn(9, 4, 3, generator=draws).to(DEVICE).requires_grad_()
    slots, arriving = torch.tensor([7, 0, 3], device=DEVICE), torch.randn(3, 4, 3, generator=draws).to(DEVICE)
    rows = way(stack, slots)
    assert torch.equal(rows, stack[slots])
    (found,), (expected,) = torch.autograd.grad(rows, stack, arriving), torch.autograd.grad(stack[slots], stack, arriving)
    assert torch.equal(found, expected)


def test_only_what_is_done_within_goes_the_direct_way(deterministic: None) -> None:
    with pytest.raises(KeyError), unique_indices(torch.device("cuda")):
        assert not torch.are_deterministic_algorithms_enabled()
        raise KeyError
    assert torch.are_deterministic_algorithms_enabled()
    with unique_indices(torch.device("cpu")):
        assert torch.are_deterministic_algorithms_enabled(), "a CPU has one way only"
