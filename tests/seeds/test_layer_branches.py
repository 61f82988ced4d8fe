"""Layer-receptive branches as a compiled host's graph has them: autograd's own values in float64, containment, and mixed banks."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from growing import germinate, short
from torch import Tensor
from torch.nn import functional

from esper.blueprints import GLU, MLP
from esper.kernels.branch_kinds import KINDS
from esper.kernels.chunk_layout import chunk_bounds
from esper.seeds.layer_branches import LayerBranches
from tests.seeds.test_compiled_life import Run

WIDTH, SEEDS, CAPACITY, HIDDEN, ROWS = 10, 3, 4, 5, 7
CHUNK = math.ceil(WIDTH / SEEDS)
SLOTS = (2, -1, 0)
"""The slot of each seed; the second has no branch."""


def stacks(kind: str) -> list[Tensor]:
    """One bank, float64; as blueprints pad them, beyond its seed's features a slot adds what nobody sees."""
    draws = torch.Generator().manual_seed(5)
    into, out, units = (CAPACITY, WIDTH, HIDDEN), (CAPACITY, HIDDEN, CHUNK), (CAPACITY, HIDDEN)
    shapes = {"w1": into, "wg": into, "wv": into, "down": into, "w2": out, "up": out, "b1": units, "bg": units, "bv": units}
    made = [torch.randn(shapes.get(name, (CAPACITY, CHUNK)), generator=draws, dtype=torch.float64) for name in KINDS[kind].stack_names]
    return [tensor.requires_grad_() for tensor in made]


def routed(bits: int = 0) -> Tensor:
    return torch.tensor([[0 if slot >= 0 else -1, slot, bits] for slot in SLOTS], dtype=torch.int32)


def expected(x: Tensor, alpha: Tensor, kind: str, bank: list[Tensor], subtract: bool) -> Tensor:
    """Seed by seed, for autograd to differentiate."""
    named, bounds, added = dict(zip(KINDS[kind].stack_names, bank, strict=True)), chunk_bounds(WIDTH, SEEDS), torch.zeros_like(x)
    for seed, slot in enumerate(SLOTS):
        if slot < 0:
            continue
        start, end = int(bounds[seed]), int(bounds[seed + 1])
        of = {name: tensor[slot] for name, tensor in named.items()}
        if kind == "glu":
            hidden = torch.sigmoid(x @ of["wg"] + of["bg"]) * (x @ of["wv"] + of["bv"])
        else:
            hidden = functional.gelu(x @ of["w1"] + of["b1"]) if kind == "mlp_gelu" else x @ of["down"]
        delta = hidden @ of.get("w2", of.get("up")) + of.get("b2", torch.zeros(CHUNK, dtype=x.dtype))
        delta = delta[:, : end - start] - (x[:, start:end] if subtract else 0.0)
        added = added + functional.pad(alpha[seed] * delta, (start, WIDTH - end))
    return added


@pytest.mark.parametrize("bits", [0, 1])
@pytest.mark.parametrize("kind", ["mlp_gelu", "glu", "low_rank"])
def test_values_and_gradients_are_autograds(kind: str, bits: int) -> None:
    x = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True)
    alpha, bank = torch.tensor([0.5, 0.7, 1.0], dtype=torch.float64), stacks(kind)
    added, live, power = LayerBranches.apply(x, alpha, routed(bits), 0, kind, *bank)
    wanted = expected(x, alpha, kind, bank, bool(bits))
    torch.testing.assert_close(added, wanted)
    assert live.tolist() == [0.5, 0.0, 1.0] and power[1] == 0 and bool((power[[0, 2]] > 0).all())
    dy = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    mine, other = (torch.autograd.grad(of, [x, *bank], dy, retain_graph=True) for of in (added, wanted))
    for found, right in zip(mine, other, strict=True):
        torch.testing.assert_close(found, right)


def test_slots_that_do_not_learn_have_gradients_of_zero_and_let_the_hosts_pass() -> None:
    x = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True)
    alpha, bank = torch.ones(SEEDS, dtype=torch.float64), stacks("mlp_gelu")
    found = torch.autograd.grad(LayerBranches.apply(x, alpha, routed(2), 0, "mlp_gelu", *bank)[0].sum(), [x, *bank])
    assert bool(found[0].any()) and not any(bool(gradient.any()) for gradient in found[1:])


def test_a_branch_that_is_not_finite_is_not_felt_in_either_direction() -> None:
    x = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True)
    alpha, bank = torch.ones(SEEDS, dtype=torch.float64), stacks("mlp_gelu")
    with torch.no_grad():
        bank[0][2] = float("nan")  # of seed 0
    added, live, _ = LayerBranches.apply(x, alpha, routed(), 0, "mlp_gelu", *bank)
    found = torch.autograd.grad(added.sum(), [x, *bank])
    bounds = chunk_bounds(WIDTH, SEEDS)
    assert live.tolist() == [0.0, 0.0, 1.0] and not bool(added[:, : bounds[1]].any())
    assert all(bool(gradient.isfinite().all()) for gradient in found) and bool(added[:, bounds[2] :].any())


def test_a_branch_whose_backward_overflows_sends_nothing_to_the_host() -> None:
    x = torch.ones(ROWS, WIDTH, requires_grad=True)
    bank = [tensor.detach().float().requires_grad_() for tensor in stacks("low_rank")]
    with torch.no_grad():
        bank[0][2], bank[1][2] = 0.0, 3e38  # δ of seed 0 is 0, its slope is not finite
    found = torch.autograd.grad(LayerBranches.apply(x, torch.ones(SEEDS), routed(), 0, "low_rank", *bank)[0].sum() * 100.0, [x, *bank])
    assert bool(found[0].isfinite().all()) and bool(found[0].any())
    assert not bool(found[1][2].isfinite().all()) and bool(found[1][0].isfinite().all())


@pytest.mark.slow
def test_branches_that_read_the_layer_and_their_chunk_share_a_site_and_a_graph() -> None:
    torch.compiler.reset()
    script: dict[int, list[Any]] = {1: [germinate("fc1")], 3: [germinate("fc1", 1, blueprint="glu")], 20: [germinate("fc2", 1)]}
    runs = [Run(script, compiled=compiled, lifecycle=short(training_slots=10)) for compiled in (True, False)]
    for run in runs:
        run.grow.registry.blueprints["glu"] = GLU(receptive_field="layer", hidden=3)
    assert isinstance(runs[0].grow.registry.blueprints["mlp"], MLP)
    for step in range(60):
        torch.testing.assert_close(*(run.step() for run in runs), rtol=1e-3, atol=1e-4, msg=f"step {step}")
    assert {branch.blueprint for branch in runs[0].grow.registry.branches.entries} == {"mlp", "glu"}
    assert [b.path for b in runs[0].grow.registry.branches.entries] == [b.path for b in runs[1].grow.registry.branches.entries]
    assert runs[0].graphs.frame_count <= 6 and not runs[0].port.refused
