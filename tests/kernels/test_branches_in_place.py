"""The op that changes a site's activation itself gives the values of the functional one, both ways, from the chunks that it keeps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from esper.kernels.branches import branches, branches_backward
from esper.kernels.branches_in_place import BranchesInPlace, branches_in_place, room_for_chunks
from esper.kernels.chunk_layout import as_rows
from tests.kernels.sites import DEVICE, Case, error, make_case

KINDS = ["affine", "low_rank", "mlp_gelu", "glu", "affine,mlp_relu,glu"]


def in_place(case: Case, dy: Tensor, strided: Tensor | None = None) -> list[Tensor]:
    """Output, live, power, gradients."""
    x = as_rows(case.x if strided is None else strided).detach().requires_grad_()
    parameters = [parameter.detach().requires_grad_() for parameter in case.parameters]
    y, live, power = BranchesInPlace.apply(x, case.alpha, case.route, case.kinds, *parameters)
    found = torch.autograd.grad(y, [x, *parameters], dy)
    return [y.detach(), live, power, *found]


def functional(case: Case, dy: Tensor, strided: Tensor | None = None) -> list[Tensor]:
    """The same of the op that writes another activation."""
    x = as_rows(case.x if strided is None else strided)
    y, live, power, _ = branches(x, case.alpha, case.route, None, case.kinds, case.parameters, False, 0.0)
    dx, gradients, _ = branches_backward(x, dy, live, None, case.route, case.kinds, case.parameters)
    return [y, live, power, dx, *gradients]


def alike(case: Case, strided: Tensor | None = None) -> None:
    x = as_rows(case.x if strided is None else strided)
    dy = torch.randn(x.shape, generator=torch.Generator().manual_seed(4)).to(x)
    for found, expected in zip(in_place(case, dy, strided), functional(case, dy, strided), strict=True):
        assert found.dtype == expected.dtype
        found, expected = found.nan_to_num(), expected.nan_to_num()
        # A GPU's compiler adds the sums of a kernel that also keeps the chunks in another order.
        assert torch.equal(found, expected) if DEVICE == "cpu" else error(found, expected) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, *(pytest.param(one, marks=pytest.mark.slow) for one in (torch.float32, torch.float16))])
@pytest.mark.parametrize("kinds", KINDS)
def test_the_same_values_as_the_functional_op(kinds: str, dtype: torch.dtype) -> None:
    alike(make_case(37, 30, 4, kinds, hidden=20, dtype=dtype))


@pytest.mark.slow
def test_whole_tiles_and_strided_rows() -> None:
    alike(make_case(128, 64, 4, "mlp_relu", hidden=16, share=1.0))
    case = make_case(24, 12, 3, "mlp_gelu")
    alike(case, strided=torch.randn(2, 12, 3, 4, device=DEVICE).movedim(1, -1))


@pytest.mark.slow
def test_hidden_units_beyond_one_block() -> None:
    case = make_case(16, 128, 1, "glu", hidden=256, share=1.0)
    case.alpha.fill_(0.5)
    alike(case)


def test_a_branch_that_is_not_finite_gives_its_chunk_back() -> None:
    case = make_case(19, 24, 4, "mlp_relu", share=1.0)
    case.alpha.fill_(0.5)
    case.parameters[0][case.route[1, 1].long()] = float("nan")
    case.alpha[2] = float("inf")
    found = in_place(case, torch.randn(1, 19, 24, device=DEVICE))
    assert found[1].tolist() == [0.5, 0.0, 0.0, 0.5]
    assert torch.equal(found[0][0, :, 6:18], case.x[:, 6:18])
    alike(case)


def working(case: Case, y: Tensor) -> tuple[Any, ...]:
    """The op's arguments, after one call."""
    kept = room_for_chunks(y, case.alpha.shape[0], case.kinds, case.parameters)
    given = (y, kept, torch.empty_like(case.alpha), torch.empty_like(case.alpha), case.alpha, case.route, case.kinds, case.parameters)
    branches_in_place(*given)
    return given


def test_it_keeps_the_chunks_and_no_more() -> None:
    case = make_case(40, 24, 8, "mlp_relu", share=0.5)
    y = as_rows(case.x).clone()
    kept = working(case, y)[1]
    assert [tuple(part.shape) for part in kept] == [(case.parameters[0].shape[0], 40, 3)]
    for seed in (case.alpha * (case.route[:, 0] >= 0)).nonzero().flatten().tolist():
        assert torch.equal(kept[0][case.route[seed, 1]], case.x[:, 3 * seed : 3 * seed + 3])


def test_opcheck_passes() -> None:
    case = make_case(6, 8, 2, "affine,low_rank", hidden=2, share=1.0)
    torch.library.opcheck(branches_in_place, working(case, as_rows(case.x).clone()))
