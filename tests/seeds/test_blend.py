"""The vectorised blend equals a loop over branches, in value and in gradient, and the full gradient flows."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from growing import Loop, germinate
from references import BLUEPRINTS, CONVS, SITES, blended_one_by_one, filled_bank
from torch import Tensor

from esper.blueprints import MLP, Affine, Geometry
from esper.lifecycle import Stage
from esper.seeds.blend import _add_block, blend
from esper.seeds.branch_groups import BlockGroup, Group, GroupMember, build
from esper.seeds.recording import Recording

CASES = [(b, s) for b in BLUEPRINTS for s in SITES] + [(b, s) for b in CONVS for s in ("series", "image")]


def activation(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).requires_grad_()


def assert_as_one_by_one(name: str, site: str, seeds: list[int], residual: bool = False) -> None:
    geometry, shape = SITES[site]
    bank, members = filled_bank((BLUEPRINTS | CONVS)[name], geometry, seeds, residual)
    groups = build(members, {bank.blueprint.name: bank}, geometry, torch.device("cpu"))
    assert len(groups) == 1, "one batched product for all branches of a bank"
    x = activation(shape)
    upstream = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    inputs = [x, *bank.stacks.values()]
    results = []
    for y in (blend(x, groups, geometry), blended_one_by_one(x, bank, members)):
        results.append((y, *torch.autograd.grad(y, inputs, upstream)))
    for mine, reference in zip(*results, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-9, atol=1e-10)
    assert not torch.equal(results[0][0], x)


@pytest.mark.parametrize(("name", "site"), CASES)
def test_all_branches_at_once_equal_one_after_the_other(name: str, site: str):
    assert_as_one_by_one(name, site, list(range(SITES[site][0].seeds)))


@pytest.mark.parametrize("name", [*BLUEPRINTS, *CONVS])
def test_some_of_the_seeds_in_any_order_do_too(name: str):
    assert_as_one_by_one(name, "image", [2, 0], residual=True)


@pytest.mark.parametrize(("name", "site"), [("mlp-chunk", "uneven"), ("glu-layer", "uneven"), ("conv-chunk", "series")])
def test_the_gradient_is_the_derivative(name: str, site: str, monkeypatch: pytest.MonkeyPatch):
    geometry, shape = SITES[site]
    blueprint = (BLUEPRINTS | CONVS)[name]
    smooth = replace(blueprint, activation="silu") if hasattr(blueprint, "activation") else blueprint  # a kink has no derivative
    bank, members = filled_bank(smooth, geometry, [0, 1])
    groups = build(members, {bank.blueprint.name: bank}, geometry, torch.device("cpu"))

    def function(x: Tensor, *values: Tensor) -> Tensor:
        rows = dict(zip(bank.stacks, values, strict=True))
        monkeypatch.setattr(bank, "gather", lambda slots, *_: {key: value.index_select(0, slots) for key, value in rows.items()})
        return blend(x, groups, geometry)

    values = [stack.detach().clone().requires_grad_() for stack in bank.stacks.values()]
    assert torch.autograd.gradcheck(function, (activation(shape), *values), atol=1e-6)


@pytest.mark.parametrize("alpha", [0.0, 0.25, 1.0])
def test_the_full_gradient_flows_upstream_at_every_alpha(alpha: float):
    """``dx = dy·(1 + α·∂δ/∂x)``: at α = 1 a form that scales the host's share by 1 − α would leave nothing of it."""
    geometry = Geometry(6, 2)
    bank, members = filled_bank(MLP(hidden=5, activation="gelu"), geometry, [0, 1])
    members = [GroupMember(member.branch, alpha, True) for member in members]
    groups = build(members, {"mlp": bank}, geometry, torch.device("cpu"))
    x, upstream = activation((4, 6)), torch.randn(4, 6, dtype=torch.float64)
    (received,) = torch.autograd.grad(blend(x, groups, geometry), x, upstream)

    def delta(row: Tensor) -> Tensor:
        return (blended_one_by_one(row[None], bank, [GroupMember(p.branch, 1.0, True) for p in members]) - row[None])[0]

    expected = [up + alpha * up @ torch.autograd.functional.jacobian(delta, row) for row, up in zip(x.detach(), upstream, strict=True)]
    torch.testing.assert_close(received, torch.stack(expected), rtol=1e-9, atol=1e-10)
    silent = [GroupMember(member.branch, alpha, True) for member in filled_bank(Affine(), geometry, [0, 1])[1]]
    zero = filled_bank(Affine(), geometry, [0, 1])[0]
    with torch.no_grad():
        [stack.zero_() for stack in zero.stacks.values()]
    (alone,) = torch.autograd.grad(blend(x, build(silent, {"affine": zero}, geometry, torch.device("cpu")), geometry), x, upstream)
    assert torch.equal(alone, upstream), "a branch that adds nothing takes nothing"


def test_only_learning_branches_get_gradients_and_the_others_pass_them_on():
    geometry = Geometry(6, 3)
    bank, members = filled_bank(MLP(hidden=5), geometry, [0, 1, 2])
    mixed = [GroupMember(member.branch, member.alpha, learning=number == 1) for number, member in enumerate(members)]
    none = [GroupMember(member.branch, member.alpha, learning=False) for member in members]
    x = activation((4, 6))
    outputs = {}
    for name, chosen in {"all": members, "mixed": mixed, "none": none}.items():
        y = blend(x, build(chosen, {"mlp": bank}, geometry, torch.device("cpu")), geometry)
        received = torch.autograd.grad(y.square().sum(), [x, *bank.stacks.values()], allow_unused=True)
        outputs[name] = (y, *received)
    for name in ("mixed", "none"):
        assert torch.equal(outputs[name][0], outputs["all"][0]) and torch.equal(outputs[name][1], outputs["all"][1])
    assert outputs["none"][2:] == (None,) * len(bank.stacks)
    for received, full in zip(outputs["mixed"][2:], outputs["all"][2:], strict=True):
        assert torch.equal(received[1], full[1])
        assert not received[[0, 2]].any()


def test_generations_on_one_chunk_add_up():
    geometry = Geometry(6, 3)
    bank, members = filled_bank(MLP(hidden=5), geometry, [1, 1])
    for member in members:
        member.branch.row = 1
    groups = build(members, {"mlp": bank}, geometry, torch.device("cpu"))
    assert len(groups) == 2
    x = activation((4, 6))
    torch.testing.assert_close(blend(x, groups, geometry), blended_one_by_one(x, bank, members))


def test_ratios_are_the_rms_of_what_a_branch_adds_over_its_chunk():
    geometry = Geometry(7, 3)
    bank, members = filled_bank(MLP(hidden=5), geometry, [0, 1, 2])
    groups = build(members, {"mlp": bank}, geometry, torch.device("cpu"))
    x = activation((5, 7)).detach()
    recording = Recording(geometry, near_zero=1e-3)
    y = blend(x, groups, geometry, recording)
    ratios = recording.ratios
    assert ratios is not None
    for member in members:
        start, end = geometry.bounds(member.branch.seed)
        expected = (y - x).detach()[:, start:end].norm() / x[:, start:end].norm()
        assert float(ratios[member.branch.id]) == pytest.approx(float(expected), rel=1e-5)


def test_half_precision_stays_half_precision():
    geometry = Geometry(6, 3)
    bank, members = filled_bank(MLP(hidden=5), geometry, [0, 1])
    groups = build(members, {"mlp": bank}, geometry, torch.device("cpu"))
    x = activation((4, 6)).detach()
    y = blend(x.bfloat16(), groups, geometry)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), blended_one_by_one(x, bank, members), rtol=0.05, atol=0.05)


def test_what_does_not_learn_is_counted_apart_from_what_does():
    geometry = Geometry(6, 3)
    bank, members = filled_bank(MLP(hidden=5), geometry, [0])
    keys = set()
    for learning in (True, False):
        (group,) = build([GroupMember(members[0].branch, 1.0, learning)], {"mlp": bank}, geometry, torch.device("cpu"))
        assert isinstance(group, Group)
        keys.add(group.cost_key())
    assert len(keys) == 2


def test_a_block_adds_to_what_the_branches_beside_it_gave() -> None:
    loop = Loop("transformer", settings={"blueprint": "block"}, commands={1: [germinate("blocks.0")]})
    loop.until(Stage.EVALUATING, most=100)
    layer = next(layer for layer in loop.grow.registry.layers if layer.groups)
    (group,) = layer.groups
    assert isinstance(group, BlockGroup)
    loop.model.eval()  # no dropout
    x = torch.randn(2, 5, layer.geometry.width, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        alone, beside = (_add_block(x, y, group, layer.geometry, None) for y in (x, x + 1.0))
    torch.testing.assert_close(beside, alone + 1.0)
    assert not torch.equal(alone, x)
