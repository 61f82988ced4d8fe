"""The kernels' one pass and the torch groups are the same forward: outputs, gradients, ratios, failures."""

from __future__ import annotations

import copy

import pytest
import torch

from esper.blueprints import GLU, MLP, Affine, Geometry, LowRank, SlotBank
from esper.engine.costs import Meter
from esper.kernels import KernelConfig, Kernels
from esper.seeds.blend import blend
from esper.seeds.branch_groups import GroupMember, build
from esper.seeds.branches import Branch
from esper.seeds.fused_group import FusedGroup, fuse
from esper.seeds.recording import Recording

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def registry_of(width: int, seeds: int) -> tuple[Geometry, dict[str, SlotBank], list[Branch]]:
    """A site on which four blueprints grew, with parameters that do something."""
    geometry = Geometry(width, seeds)
    blueprints = [
        MLP(receptive_field="chunk", hidden=5),
        GLU(receptive_field="chunk", hidden=3),
        LowRank(receptive_field="chunk"),
        Affine(),
    ]
    draws = torch.Generator().manual_seed(1)
    banks = {blueprint.name: SlotBank(blueprint, geometry, DEVICE) for blueprint in blueprints}
    branches = []
    for number, blueprint in enumerate(blueprints * 2):
        slot = banks[blueprint.name].allocate(number, draws, silent=False)
        branches.append(Branch(number, 0, number, number, blueprint.name, slot, 1, "linear", 0, 0, residual=number == 4))
    return geometry, banks, branches


@pytest.mark.parametrize("width", [32, 29])
def test_one_pass_equals_the_groups(width: int):
    geometry, banks, branches = registry_of(width, 10)
    members = [GroupMember(branch, 0.1 + 0.1 * branch.id, branch.id % 3 != 0) for branch in branches]
    twin = copy.deepcopy(banks)
    kernels = Kernels(KernelConfig("triton"))
    plain = build(members, twin, geometry, DEVICE)
    fused = fuse(build(members, banks, geometry, DEVICE), "site", geometry, {b.id: b.seed for b in branches}, kernels, DEVICE)
    assert [type(group) for group in fused] == [FusedGroup]
    x = torch.randn(7, 3, width, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    outcomes = []
    for groups, owned in ((plain, twin), (fused, banks)):
        leaf = x.clone().requires_grad_()
        recording = Recording(geometry, 1e-3)
        recording.read(leaf)
        y = blend(leaf, groups, geometry, recording)
        y.square().sum().backward()
        gradients = {f"{name}.{key}": stack.grad for name, bank in owned.items() for key, stack in bank.stacks.items()}
        outcomes.append((y.detach(), leaf.grad, gradients, recording.ratios))
    (y1, dx1, p1, r1), (y2, dx2, p2, r2) = outcomes
    torch.testing.assert_close(y2, y1)
    torch.testing.assert_close(dx2, dx1)
    for name, gradient in p1.items():
        torch.testing.assert_close(p2[name], gradient, msg=name, rtol=1e-4, atol=1e-5)
    assert r1 is not None and r2 is not None and r1.keys() == r2.keys()
    for branch, ratio in r1.items():
        torch.testing.assert_close(r2[branch], ratio, rtol=1e-3, atol=1e-6)


def test_a_branch_that_is_not_finite_is_counted_and_adds_nothing():
    geometry, banks, branches = registry_of(30, 10)
    with torch.no_grad():
        banks["mlp"].stacks["b2"][branches[0].slot] = float("nan")
    kernels = Kernels(KernelConfig("triton"))
    members = [GroupMember(branch, 0.5, True) for branch in branches]
    (fused,) = fuse(build(members, banks, geometry, DEVICE), "site", geometry, {b.id: b.seed for b in branches}, kernels, DEVICE)
    x = torch.randn(6, 30, device=DEVICE, requires_grad=True)
    y = blend(x, [fused], geometry)
    y.sum().backward()
    assert torch.equal(y[:, :3], x[:, :3]) and x.grad is not None and bool(torch.isfinite(x.grad).all())
    assert fused.failures.tolist() == [float(branch == 0) for branch in fused.branches]


def test_counting_macs_sees_what_the_fused_pass_stands_for():
    geometry, banks, branches = registry_of(30, 10)
    kernels = Kernels(KernelConfig("triton"))
    members = [GroupMember(branch, 0.5, True) for branch in branches]
    groups = build(members, banks, geometry, DEVICE)
    fused = fuse(list(groups), "site", geometry, {b.id: b.seed for b in branches}, kernels, DEVICE)
    x = torch.randn(6, 30, device=DEVICE)
    meter, plain = Meter(kernels), Meter()
    with meter.counting("step", "fused"):
        counted = blend(x, fused, geometry)
    with plain.counting("step", "groups"):
        expected = blend(x, groups, geometry)
    assert meter.total == plain.total > 0 and torch.equal(counted, expected) and not kernels.suspended


def test_what_the_kernels_cannot_take_stays_outside():
    geometry = Geometry(12, 3)
    wide = SlotBank(MLP(receptive_field="layer"), geometry, DEVICE)
    wide.allocate(0, torch.Generator().manual_seed(0), silent=True)
    branch = Branch(0, 0, 0, 0, "mlp", 0, 1, "linear", 0, 0)
    kernels = Kernels(KernelConfig("triton"))
    groups = build([GroupMember(branch, 1.0, True)], {"mlp": wide}, geometry, DEVICE)
    assert fuse(groups, "site", geometry, {0: 0}, kernels, DEVICE) is groups
