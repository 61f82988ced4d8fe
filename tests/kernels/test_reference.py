"""The plain torch path: what the kernels are measured against must itself be right."""

import itertools

import pytest
import torch

from esper.kernels.chunk_layout import as_rows, chunk_bounds, feature_owner, gather_chunks
from esper.kernels.reference import telemetry
from esper.kernels.reference_branches import ReferenceBranches, backward, forward
from tests.kernels.sites import make_case

ALL_KINDS = ["affine", "low_rank", "mlp_relu", "mlp_gelu", "mlp_silu", "glu", "affine,mlp_gelu,glu"]


def seed_by_seed(x, seeds, near_zero):
    """Telemetry written as its definition, one seed after another, in float64."""
    x, bounds, rows = x.double(), chunk_bounds(x.shape[1], seeds).tolist(), []
    for begin, end in itertools.pairwise(bounds):
        chunk, others = x[:, begin:end], torch.cat([x[:, :begin], x[:, end:]], 1)
        together = torch.corrcoef(torch.stack([chunk.mean(1), others.mean(1)]))[0, 1] if seeds > 1 else torch.zeros(())
        rows.append(torch.stack([chunk.mean(), chunk.var(unbiased=False), (chunk.abs() < near_zero).double().mean(), together]))
    return torch.stack(rows)


@pytest.mark.parametrize(("rows", "width", "seeds"), [(64, 32, 4), (33, 30, 7), (17, 10, 10), (9, 8, 1)])
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_telemetry_is_its_definition(rows, width, seeds, offset):
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(1)) + offset
    torch.testing.assert_close(telemetry(x, seeds, 0.3).double(), seed_by_seed(x, seeds, 0.3), rtol=1e-4, atol=1e-5)


def test_telemetry_of_no_rows_says_nothing_was_measured():
    assert telemetry(torch.empty(0, 6), 3, 0.1).isnan().all()


def test_a_constant_chunk_has_no_correlation():
    x = torch.randn(20, 6)
    x[:, :2] = 5.0
    assert telemetry(x, 3, 0.1)[0].tolist()[1:] == [0.0, 0.0, 0.0]


def test_chunks_and_owners_agree():
    x = torch.arange(33.0)[None]
    chunks, owner = gather_chunks(x, 7)[0], feature_owner(33, 7)
    assert [sorted(row[row != 0].tolist() or [0.0]) for row in chunks][1:] == [x[0][owner == s].tolist() for s in range(1, 7)]


def test_channels_first_images_become_rows_without_a_copy():
    image = torch.randn(2, 6, 3, 4)
    rows = as_rows(image.movedim(1, -1))
    assert rows.data_ptr() == image.data_ptr()
    assert torch.equal(rows.reshape(-1, 6), image.movedim(1, -1).reshape(-1, 6))


@pytest.mark.parametrize("kinds", ALL_KINDS)
def test_reference_gradients_are_those_of_its_forward(kinds):
    case = make_case(5, 11, 3, kinds, hidden=3, share=1.0, draw=3).to(torch.float64)
    inputs = [t.cpu().requires_grad_() for t in (case.x, *case.parameters)]
    alpha, route = case.alpha.cpu().double(), case.route.cpu()
    step = lambda x, *parameters: ReferenceBranches.apply(x, alpha, route, None, kinds, *parameters)[0]  # noqa: E731
    assert torch.autograd.gradcheck(step, inputs)


@pytest.mark.parametrize("kinds", ["affine", "glu"])
def test_a_lesson_is_half_the_squared_distance(kinds):
    case = make_case(6, 12, 3, kinds, hidden=3, share=1.0, draw=5).to(torch.float64)
    x, dy, route = case.x.cpu(), torch.randn(6, 12, dtype=torch.float64), case.route.cpu()
    parameters = [p.cpu().requires_grad_() for p in case.parameters]
    objective, off = torch.tensor([[0.5, 0.25]] * 3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    dx, grads, residual = backward(x, dy, off, objective, route, kinds, [p.detach() for p in parameters])
    y = forward(x, torch.ones(3, dtype=torch.float64), route, kinds, parameters)[0]
    expected = torch.autograd.grad(0.25 * 0.5 * (y - x + 0.5 * dy).square().sum(), parameters)
    assert torch.equal(dx, dy)
    for found, wanted in zip(grads, expected, strict=True):
        torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(residual.sum(), (y - x + 0.5 * dy).square().sum().detach())


def test_full_strength_does_not_starve_what_lies_upstream():
    """At α = 1 a silent branch (δ = 0) passes the host's whole gradient; the lerp form would scale it by 1 - α = 0."""
    x = torch.randn(4, 8, requires_grad=True)
    zeros, route = torch.zeros(2, 4), torch.tensor([[0, 0, 0], [0, 1, 0]], dtype=torch.int32)
    y, _, _ = ReferenceBranches.apply(x, torch.ones(2), route, None, "affine", zeros, zeros)
    y.backward(torch.ones_like(y))
    assert torch.equal(x.grad, torch.ones_like(x))
