"""Branches that a compiler traces through their blueprint: autograd's own values in float64, and containment in both directions."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from esper.blueprints import Affine, Blueprint, Conv, Geometry
from esper.kernels.chunk_layout import chunk_bounds
from esper.seeds.traced_branches import TracedBank, traced_branches

pytestmark = pytest.mark.slow

WIDTH, SEEDS, CAPACITY = 7, 3, 4
SLOTS = (2, -1, 0)
"""The slot of each seed; the second has no branch."""
PLACES = (5, 4)
BLUEPRINTS: dict[str, Blueprint] = {
    "conv": Conv(receptive_field="chunk", activation="silu"),
    "conv of the layer": Conv(receptive_field="layer", activation="silu", expand=2),
    "affine of the layer": Affine(receptive_field="layer"),
}


class Site:
    """A bank of random parameters, padded as a bank pads them, and what the compiler makes of it."""

    def __init__(self, blueprint: Blueprint) -> None:
        self.blueprint, self.bounds = blueprint, chunk_bounds(WIDTH, SEEDS).tolist()
        geometry = Geometry(WIDTH, SEEDS, dim=1 if blueprint.spatial else -1, spatial=2 if blueprint.spatial else 0)
        draws, chunk = torch.Generator().manual_seed(5), math.ceil(WIDTH / SEEDS)
        shapes = blueprint.shapes(blueprint.reads(geometry, chunk), chunk, geometry)
        self.bank = {name: torch.zeros(CAPACITY, *shape, dtype=torch.float64) for name, shape in shapes.items()}
        for seed, slot in enumerate(SLOTS):
            width = self.bounds[seed + 1] - self.bounds[seed]
            for name, shape in blueprint.shapes(blueprint.reads(geometry, width), width, geometry).items() if slot >= 0 else ():
                inside = (slot, *(slice(size) for size in shape))
                self.bank[name][inside] = torch.randn(shape, generator=draws, dtype=torch.float64)
        for stack in self.bank.values():
            stack.requires_grad_()
        places = PLACES if blueprint.spatial else ()
        self.x = torch.randn(2, *places, WIDTH, generator=draws, dtype=torch.float64, requires_grad=True)

    def compiled(self, alpha: Tensor, bits: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        route = torch.tensor([[0 if slot >= 0 else -1, slot, bits] for slot in SLOTS], dtype=torch.int32)
        bank = TracedBank(self.blueprint, self.bank)
        call: Any = torch.compile(lambda x: traced_branches(x, alpha, route, 0, bank), backend="aot_eager", fullgraph=True)
        found: tuple[Tensor, Tensor, Tensor] = call(self.x)
        return found

    def seed_by_seed(self, alpha: Tensor, subtract: bool) -> Tensor:
        """For autograd to differentiate."""
        parts = []
        for seed, slot in enumerate(SLOTS):
            chunk = self.x[..., self.bounds[seed] : self.bounds[seed + 1]]
            parts.append(torch.zeros_like(chunk))
            if slot >= 0:
                parts[-1] = alpha[seed] * (self._net(chunk, slot) - (chunk if subtract else 0.0))
        return torch.cat(parts, -1)

    def _net(self, chunk: Tensor, slot: int) -> Tensor:
        reads, width = self.x if self.blueprint.receptive_field == "layer" else chunk, chunk.shape[-1]
        own = {name: stack[slot : slot + 1] for name, stack in self.bank.items()}
        if not self.blueprint.spatial:
            return self.blueprint.forward(own, reads.reshape(1, -1, reads.shape[-1]))[..., :width].view(chunk.shape)
        middle = reads.shape[-1] * self.blueprint.expand  # type: ignore[attr-defined]
        inside = {name: value[:, :middle] for name, value in own.items() if name not in ("pointwise", "bias")}
        inside |= {"pointwise": own["pointwise"][:, :width, :middle], "bias": own["bias"][:, :width]}
        return self.blueprint.forward(inside, reads.movedim(-1, 1).unsqueeze(1)).squeeze(1).movedim(1, -1)


@pytest.fixture(autouse=True)
def compiles_anew() -> None:
    torch.compiler.reset()


@pytest.mark.parametrize("bits", [0, 1])
@pytest.mark.parametrize("kind", BLUEPRINTS)
def test_values_and_gradients_are_autograds(kind: str, bits: int) -> None:
    site, alpha = Site(BLUEPRINTS[kind]), torch.tensor([0.5, 0.7, 1.0], dtype=torch.float64)
    (added, live, power), wanted = site.compiled(alpha, bits), site.seed_by_seed(alpha, bool(bits))
    torch.testing.assert_close(added, wanted)
    assert live.tolist() == [0.5, 0.0, 1.0] and power[1] == 0 and bool((power[[0, 2]] > 0).all())
    dy = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    mine, other = (torch.autograd.grad(of, [site.x, *site.bank.values()], dy) for of in (added, wanted))
    for found, right in zip(mine, other, strict=True):
        torch.testing.assert_close(found, right)


def test_slots_that_do_not_learn_have_gradients_of_zero_and_let_the_hosts_pass() -> None:
    site = Site(BLUEPRINTS["conv"])
    found = torch.autograd.grad(site.compiled(torch.ones(SEEDS), 2)[0].square().sum(), [site.x, *site.bank.values()])
    assert bool(found[0].any()) and not any(bool(gradient.any()) for gradient in found[1:])


@pytest.mark.parametrize("kind", BLUEPRINTS)
def test_a_branch_that_is_not_finite_is_not_felt_in_either_direction(kind: str) -> None:
    site = Site(BLUEPRINTS[kind])
    with torch.no_grad():
        site.bank[site.blueprint.output][2] = float("nan")  # of seed 0
    added, live, _ = site.compiled(torch.ones(SEEDS))
    (found,) = torch.autograd.grad(added.sum(), [site.x])
    assert live.tolist() == [0.0, 0.0, 1.0]
    assert not bool(added[..., : site.bounds[1]].any()) and bool(added[..., site.bounds[2] :].any())
    assert bool(found.isfinite().all()) and bool(found.any())


def test_alpha_that_is_not_finite_adds_nothing() -> None:
    site, alpha = Site(BLUEPRINTS["conv"]), torch.tensor([float("inf"), 0.0, 1.0])
    added, live, _ = site.compiled(alpha)
    found = torch.autograd.grad(added.sum(), [site.x, *site.bank.values()])
    assert live.tolist() == [0.0, 0.0, 1.0] and all(bool(gradient.isfinite().all()) for gradient in found)


def test_a_branch_whose_backward_overflows_sends_nothing_to_the_host() -> None:
    site = Site(BLUEPRINTS["affine of the layer"])
    site.x = torch.zeros(2, WIDTH, requires_grad=True)
    site.bank = {name: stack.detach().float().requires_grad_() for name, stack in site.bank.items()}
    with torch.no_grad():
        site.bank["scale"][2] = 3e38  # δ of seed 0 is finite, its slope times the gradient is not
    (found,) = torch.autograd.grad(site.compiled(torch.ones(SEEDS))[0].sum() * 100.0, [site.x])
    assert bool(found.isfinite().all()) and bool(found.any())
