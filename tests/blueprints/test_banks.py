"""Slot banks: memory only for what germinated, doubling that loses nothing, and freed slots without a past."""

from __future__ import annotations

import pytest
import torch
from growing import Net
from torch import nn

from esper.blueprints import MLP, Block, BlockBank, Geometry, SlotBank
from esper.errors import UserError

CPU = torch.device("cpu")


def draws(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def bank(seeds: int = 4) -> SlotBank:
    return SlotBank(MLP(hidden=3), Geometry(10, seeds), CPU)


def test_nothing_is_allocated_before_something_germinates():
    empty = bank()
    assert empty.capacity == 0 and list(empty.parameters()) == []


def test_doubling_keeps_values_gradients_moments_and_steps():
    subject = bank()
    slots = [subject.allocate(0, draws(), silent=True)]
    for seed in (1, 2, 3):
        for stack in subject.stacks.values():
            stack.grad = torch.randn_like(stack)
        for first, second in subject.moments.values():
            first.normal_()
            second.uniform_()
        subject.steps.copy_(torch.arange(1.0, subject.capacity + 1))
        old = {name: (stack.detach().clone(), stack.grad.clone()) for name, stack in subject.stacks.items()}
        moments = {name: (first.clone(), second.clone()) for name, (first, second) in subject.moments.items()}
        steps, capacity = subject.steps.clone(), subject.capacity
        slots.append(subject.allocate(seed, draws(seed), silent=True))
        kept = [slot for slot in range(capacity) if slot != slots[-1]]
        for name, stack in subject.stacks.items():
            assert stack.grad is not None
            for new, before in zip((stack, stack.grad, *subject.moments[name]), (*old[name], *moments[name]), strict=True):
                assert torch.equal(new[kept], before[kept])
        assert torch.equal(subject.steps[kept], steps[kept])
    assert slots == [0, 1, 2, 3] and subject.capacity == 4 and all(subject.used)


def test_a_freed_slot_is_clean_and_is_used_again():
    subject = bank()
    for seed in (0, 1):
        subject.allocate(seed, draws(seed), silent=False)
    for stack in subject.stacks.values():
        stack.data.fill_(1.0)
        stack.grad = torch.ones_like(stack)
    for first, second in subject.moments.values():
        first.fill_(2.0)
        second.fill_(3.0)
    subject.steps.fill_(9.0)
    subject.free(0)
    for name, stack in subject.stacks.items():
        assert stack.grad is not None
        for values in (stack, stack.grad, *subject.moments[name]):
            assert not values[0].any() and bool(values[1].any())
    assert subject.steps.tolist() == [0.0, 9.0] and subject.used == [False, True]
    assert subject.allocate(2, draws(), silent=True) == 0 and subject.capacity == 2


def test_an_allocation_that_fails_changes_nothing(monkeypatch: pytest.MonkeyPatch):
    subject = bank()
    subject.allocate(0, draws(), silent=True)
    before = dict(subject.stacks.items())
    made = []

    def out_of_memory(value: torch.Tensor) -> nn.Parameter:
        made.append(value)
        if len(made) == 3:
            raise MemoryError
        return nn.Parameter(value)

    monkeypatch.setattr("esper.blueprints.bank.nn.Parameter", out_of_memory)
    with pytest.raises(MemoryError):
        subject.allocate(1, draws(), silent=True)
    assert subject.capacity == 1 and subject.used == [True] and len(subject.steps) == 1
    assert all(subject.stacks[name] is stack for name, stack in before.items())
    assert {len(first) for first, _ in subject.moments.values()} == {1}


def test_uneven_chunks_are_padded_with_zeros_that_get_no_gradient():
    subject = SlotBank(MLP(hidden=3, receptive_field="chunk"), Geometry(5, 2), CPU)
    subject.allocate(0, draws(), silent=False)
    assert subject.stacks["w1"].shape == (1, 3, 3) and not subject.stacks["w1"][0, 2].any()
    assert not subject.stacks["w2"][0, :, 2].any()


class Residual(nn.Module):
    output_layers = ("out",)

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm, self.out = nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.out(torch.relu(self.norm(self.inner(x))))


@pytest.mark.parametrize("start", ["copy", "zero_copy", "fresh"])
def test_a_block_starts_as_it_says(start: str):
    site = Residual()
    site.register_forward_hook(lambda *_: None)
    blocks = BlockBank(Block(start=start), [site], CPU)
    slot = blocks.allocate(0, draws(), silent=True)
    grown, x = blocks.blocks[str(slot)], torch.randn(3, 4)
    assert grown is not site and not grown._forward_hooks and site._forward_hooks
    same_inner = torch.equal(grown.inner.weight, site.inner.weight)
    assert same_inner == (start != "fresh")
    delta = blocks.delta(slot, x, learning=True)
    expected = site(x) - x if start == "copy" else torch.zeros_like(x)
    torch.testing.assert_close(delta, expected)
    assert blocks.parameters_of(slot) == sum(p.numel() for p in site.parameters())
    if start == "fresh":
        assert bool((grown.norm.weight == 1).all()) and not grown.norm.bias.any()
        assert float(grown.inner.weight.detach().abs().max()) <= 0.5
    (grown(x).sum()).backward()
    assert all(p.grad is None for p in site.parameters()), "a copy shares nothing with the host"


def test_a_frozen_block_passes_gradients_on_but_keeps_none():
    blocks = BlockBank(Block(start="copy"), [Residual()], CPU)
    slot = blocks.allocate(0, draws(), silent=True)
    x = torch.randn(3, 4, requires_grad=True)
    blocks.delta(slot, x, learning=False).sum().backward()
    assert x.grad is not None and bool(x.grad.any())
    assert all(p.grad is None for p in blocks.blocks[str(slot)].parameters())


def test_block_slots_are_never_used_twice_and_a_freed_one_is_gone():
    blocks = BlockBank(Block(), [Residual()], CPU)
    assert blocks.allocate(0, draws(), silent=True) == 0
    blocks.free(0)
    assert blocks.allocate(0, draws(), silent=True) == 1
    assert list(blocks.blocks) == list(blocks.moments) == list(blocks.steps) == ["1"]


def test_a_block_whose_output_nobody_names_is_refused_in_words():
    with pytest.raises(UserError, match=r"Net write its output; set blueprint\.output_layers"):
        Block().build([Net()], draws())
    assert "no layer 'nowhere'" in (Block(output_layers=["nowhere"]).silencing_misfit(Net()) or "")
    assert Block(start="copy").silencing_misfit(Net()) is None
    assert not Block(output_layers=["head"]).build([Net()], draws()).head.weight.any()
