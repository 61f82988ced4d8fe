"""Several blocks as one branch, copies of a whole stack, and blocks that run twice: against plain torch in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from esper.blueprints import Block, BlockBank
from esper.blueprints.block_call import Chain
from esper.errors import UserError
from esper.seeds.layer import ATTRIBUTE
from esper.seeds.sites import stack_of

CPU = torch.device("cpu")


class Residual(nn.Module):
    output_layers = ("out",)

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.inner, self.out = nn.Linear(width, 6), nn.Linear(6, width)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return x + scale * self.out(torch.tanh(self.inner(x)))


class Host(nn.Module):
    """Three blocks of one kind, a layer of another kind in their midst."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Residual(), nn.LayerNorm(4), Residual(), Residual(), Residual()])
        self.other = Residual()


def draws() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def stack(count: int) -> list[nn.Module]:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return [Residual().double() for _ in range(count)]


def run(blocks: list[nn.Module], x: Tensor) -> Tensor:
    for block in blocks:
        x = block(x)
    return x


def test_a_stack_is_what_lies_in_the_same_list_before_the_site() -> None:
    host = Host()
    assert stack_of(host, "blocks.3") == [host.blocks[0], host.blocks[2], host.blocks[3]]
    assert stack_of(host, "other") == [host.other]
    wider = nn.Sequential(Residual(4), Residual(8), Residual(8))
    assert stack_of(wider, "2") == [wider[1], wider[2]], "blocks of another width are no part of it"
    wider[1].add_module(ATTRIBUTE, nn.Linear(2, 2))
    assert stack_of(wider, "2") == [wider[1], wider[2]], "with seeds on them"


@pytest.mark.parametrize(("source", "blocks", "order"), [("stack", 7, [0, 1, 2, 0, 1, 2, 0]), ("site", 3, [2, 2, 2]), ("stack", 1, [0])])
def test_copies_are_run_one_behind_the_other_with_the_gradients_of_plain_blocks(source: str, blocks: int, order: list[int]) -> None:
    host = stack(3)
    bank = BlockBank(Block(start="copy", source=source, blocks=blocks), host, CPU)
    slot = bank.allocate(0, draws(), silent=True)
    plain = [copy.deepcopy(host[number]) for number in order]
    x, y = (torch.randn(5, 4, dtype=torch.float64, generator=draws()).requires_grad_() for _ in range(2))
    weights = torch.randn(5, 4, dtype=torch.float64)
    (bank.delta(slot, x, learning=True) * weights).sum().backward()
    ((run(plain, y) - y) * weights).sum().backward()
    torch.testing.assert_close(bank.delta(slot, x, True), run(plain, y) - y)
    torch.testing.assert_close(x.grad, y.grad)
    expected = [p.grad for block in plain for p in block.parameters()]
    for mine, theirs in zip(bank.learning_parameters(slot), expected, strict=True):
        torch.testing.assert_close(mine.grad, theirs)
    assert bank.parameters_of(slot) == blocks * sum(p.numel() for p in host[0].parameters())
    assert isinstance(bank.blocks[str(slot)], Chain) == (blocks > 1)
    assert all(p.grad is None for block in host for p in block.parameters())


@pytest.mark.parametrize(("start", "silent", "copied"), [("copy", 0, 1), ("zero_copy", 1, 1), ("fresh", 1, 0), ("random", 0, 0)])
def test_a_stack_starts_as_it_says(start: str, silent: bool, copied: bool) -> None:
    host = stack(2)
    bank = BlockBank(Block(start=start, source="stack", blocks=4), host, CPU)
    slot = bank.allocate(0, draws(), silent=True)
    delta = bank.delta(slot, torch.randn(3, 4, dtype=torch.float64), learning=True)
    assert bool(silent) == (not delta.any())
    inner = [torch.equal(block.inner.weight, host[number % 2].inner.weight) for number, block in enumerate(bank.blocks[str(slot)])]
    assert inner == [bool(copied)] * 4
    firsts = {tuple(block.inner.weight.flatten().tolist()) for block in bank.blocks[str(slot)]}
    assert len(firsts) == (2 if copied else 4), "fresh blocks are not drawn alike"


def test_the_hosts_call_reaches_every_block() -> None:
    host = stack(1)
    bank = BlockBank(Block(start="copy", blocks=2), host, CPU)
    slot = bank.allocate(0, draws(), silent=True)
    x = torch.randn(3, 4, dtype=torch.float64)
    bank.call = type(bank.call).of((x,), {"scale": 0.5})
    torch.testing.assert_close(bank.delta(slot, x, True), host[0](host[0](x, 0.5), 0.5) - x)


@pytest.mark.parametrize("learning", [True, False])
@pytest.mark.parametrize(("source", "blocks"), [("site", 1), ("stack", 2)])
def test_a_shared_block_is_the_hosts_own_and_teaches_it_from_both_places(source: str, blocks: int, learning: bool) -> None:
    host, twin = stack(2), stack(2)
    bank = BlockBank(Block(start="shared", source=source, blocks=blocks), host, CPU)
    slot = bank.allocate(0, draws(), silent=True)
    again: Callable[[list[nn.Module]], list[nn.Module]] = lambda own: own[-1:] if source == "site" else own  # noqa: E731
    x = torch.randn(5, 4, dtype=torch.float64)
    y = run(host, x)
    (y + 0.3 * bank.delta(slot, y, learning)).square().sum().backward()
    z = run(twin, x)
    (z + 0.3 * (run(again(twin), z) - z)).square().sum().backward()
    for mine, theirs in zip(nn.ModuleList(host).parameters(), nn.ModuleList(twin).parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)
    assert bank.parameters_of(slot) == 0 and bank.learning_parameters(slot) == []
    with torch.no_grad():
        host[-1].out.bias += 1.0
    torch.testing.assert_close(bank.delta(slot, y, learning), run(again(host), y) - y, msg="it is what the host's is now")


def test_untying_changes_no_output_and_parts_what_was_shared() -> None:
    host = stack(2)
    bank = BlockBank(Block(start="shared", source="stack", blocks=2), host, CPU)
    slot = bank.allocate(0, draws(), silent=True)
    with torch.no_grad():
        host[0].out.bias += 1.0  # the host has learnt since
    x = torch.randn(5, 4, dtype=torch.float64)
    before, plain = bank.delta(slot, x, True), bank.plain(slot)
    bank.untie(slot)
    assert torch.equal(bank.delta(slot, x, True), before) and torch.equal(plain(x) - x, before)
    assert bank.parameters_of(slot) == sum(p.numel() for block in host for p in block.parameters())
    with torch.no_grad():
        host[0].out.bias += 1.0
    assert torch.equal(bank.delta(slot, x, True), before)
    bank.delta(slot, x, True).sum().backward()
    assert all(p.grad is None for block in host for p in block.parameters())


@pytest.mark.parametrize("tied", [True, False])
def test_a_saved_stack_comes_back_as_it_was(tied: bool) -> None:
    host = stack(3)
    blueprint = Block(start="shared", source="stack", blocks=5)
    bank, other = BlockBank(blueprint, host, CPU), BlockBank(blueprint, host, CPU)
    slot = bank.allocate(0, draws(), silent=True)
    if not tied:
        bank.untie(slot)
        with torch.no_grad():
            bank.blocks["0"][4].inner.weight.mul_(2.0)
    other.load(bank.state())
    x = torch.randn(3, 4, dtype=torch.float64)
    assert torch.equal(other.delta(slot, x, True), bank.delta(slot, x, True)) and other.tied == bank.tied
    old = {name: value for name, value in bank.state().items() if name != "tied"}
    other.load(old)  # of a version that could not tie
    assert not other.tied
    bank.free(slot)
    assert not bank.tied
    with pytest.raises(ValueError, match="not built like the host's"):
        BlockBank(Block(start="copy", blocks=4, source="stack"), host, CPU).load(other.state())


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"untie": "5%"}, r"^blueprint\.untie=5% is for blocks that share weights; add blueprint\.start=shared"),
        ({"start": "fresh", "state": "copied"}, r"^blueprint\.state=copied needs copies, and blueprint\.start=fresh has none"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings: dict[str, str], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        Block(**settings)
