"""Narrow chunks that share a tile: the reference's values, and no branch is felt by another of its tile, whatever becomes of it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from esper.kernels import launch_rules, reference_branches
from esper.kernels.branches import branches, branches_backward
from esper.kernels.chunk_layout import as_rows, chunk_bounds
from tests.kernels.sites import DEVICE, Case, error, make_case


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Seeds to a program, of every launch."""
    seen: list[int] = []
    rule = launch_rules.packed

    def noted(*given: object) -> launch_rules.Launch | None:
        launch = rule(*given)  # type: ignore[arg-type]
        seen.append(1 if launch is None else launch.packed)
        return launch

    monkeypatch.setattr(launch_rules, "packed", noted)
    return seen


def passes(case: Case, dy: Tensor) -> list[Tensor]:
    """``y, live, power, dx, gradients…``."""
    x = as_rows(case.x)
    y, live, power, _ = branches(x, case.alpha, case.route, None, case.kinds, case.parameters, False, 0.0)
    dx, gradients, _ = branches_backward(x, dy, live, None, case.route, case.kinds, case.parameters)
    return [y, live, power, dx, *gradients]


def arriving(case: Case) -> Tensor:
    return torch.randn(as_rows(case.x).shape, generator=torch.Generator().manual_seed(4)).to(case.x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kinds", ["mlp_relu", "mlp_gelu", "low_rank", "mlp_silu,low_rank"])
@pytest.mark.parametrize(("width", "seeds"), [(37, 12), *(pytest.param(*one, marks=pytest.mark.slow) for one in ((40, 10), (24, 3)))])
def test_the_values_are_the_references(packed: list[int], width: int, seeds: int, kinds: str, dtype: torch.dtype) -> None:
    case = make_case(45, width, seeds, kinds, hidden=7, share=0.8, dtype=dtype)
    dy = arriving(case)
    y, live, power, dx, *gradients = passes(case, dy)
    wide, x64, dy64 = case.to(torch.float64), case.x.double(), dy.double().reshape(-1, width)
    expected, alive, squares = reference_branches.forward(x64, case.alpha, case.route, kinds, wide.parameters)
    d_expected, g_expected, _ = reference_branches.backward(x64, dy64, alive, None, case.route, kinds, wide.parameters)
    assert torch.equal(live, alive) and error(power, squares) <= 4e-2
    assert error(y[0], expected) <= 2e-2 and error(dx[0], d_expected) <= 2e-2
    assert error(torch.cat([g.flatten() for g in gradients]), torch.cat([g.flatten() for g in g_expected])) <= 2e-2
    assert set(packed) == {16 // launch_rules.power_of_two(-(-width // seeds))}


def spoilt(case: Case, what: str, seed: int, dy: Tensor) -> tuple[Case, Tensor]:
    """The case with something of one seed not finite."""
    bounds = chunk_bounds(case.x.shape[-1], case.alpha.shape[0])
    x, parameters, dy = case.x.clone(), [parameter.clone() for parameter in case.parameters], dy.clone()
    if what in ("w1", "w2"):
        parameters[0 if what == "w1" else 2][case.route[seed, 1].long()] = float("nan")
    elif what == "x":
        x[5, bounds[seed]] = float("inf")
    elif what == "large":  # the hidden units overflow, the input does not
        parameters[0][case.route[seed, 1].long()] = 3e38
        x[:, bounds[seed]] = 1e30
    else:
        dy[0, 7, bounds[seed]] = float("nan")
    return Case(x, case.alpha, case.route, case.kinds, parameters), dy


@pytest.mark.slow
@pytest.mark.parametrize("what", ["w1", *(pytest.param(one, marks=pytest.mark.slow) for one in ("w2", "x", "large", "dy"))])
def test_no_branch_is_felt_by_another_of_its_tile(what: str) -> None:
    case = make_case(40, 32, 10, "mlp_relu", hidden=6, share=1.0, dtype=torch.bfloat16)
    case.alpha.fill_(0.5)
    dy, seed = arriving(case), 4
    whole, broken = passes(case, dy), passes(*spoilt(case, what, seed, dy))
    bounds, slot = chunk_bounds(32, 10), int(case.route[seed, 1])
    others = torch.ones(32, dtype=torch.bool)
    others[bounds[seed] : bounds[seed + 1]] = False
    slots = torch.arange(case.parameters[0].shape[0]) != slot
    assert broken[1].tolist() == [0.0 if number == seed and what != "dy" else 0.5 for number in range(10)]
    for place in (0, 3):
        assert torch.equal(whole[place][..., others], broken[place][..., others])
    for fine, other in zip(whole[4:], broken[4:], strict=True):  # without the seed the others' rows are divided otherwise
        assert torch.equal(fine[slots], other[slots]) if what == "dy" else error(other[slots], fine[slots]) <= 1e-5
    if what == "dy":
        assert not all(gradient[slot].isfinite().all() for gradient in broken[4:])
    else:
        assert torch.equal(broken[0][0][:, ~others], spoilt(case, what, seed, dy)[0].x[:, ~others])
        assert all(not gradient[slot].any() for gradient in broken[4:])


def test_without_biases_too_a_gradient_that_is_not_finite_is_seen() -> None:
    case = make_case(40, 32, 10, "low_rank", hidden=6, share=1.0, dtype=torch.bfloat16)
    case.alpha.fill_(0.5)
    found = passes(*spoilt(case, "dy", 4, arriving(case)))
    slot = int(case.route[4, 1])
    assert not all(gradient[slot].isfinite().all() for gradient in found[4:])
    assert all(gradient[torch.arange(len(gradient)) != slot].isfinite().all() for gradient in found[4:])


def test_wide_chunks_and_float32_have_a_tile_of_their_own() -> None:
    limit = launch_rules.limits(torch.device(DEVICE))
    assert launch_rules.packed(4, 16, 2, 100, limit, False) is not None
    assert launch_rules.packed(4, 16, 4, 100, limit, False) is None
    assert launch_rules.packed(9, 16, 2, 100, limit, True) is None
    assert launch_rules.packed(4, 17, 2, 100, limit, True) is None
