"""The branches op against the float64 reference: every kind, dtype, layout and mix of stages. Runs in the interpreter and on a GPU."""

import os

import pytest
import torch
import torch._dynamo.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from esper.kernels import branches as branches_module
from esper.kernels import launch_rules, reference, reference_branches, telemetry
from esper.kernels.branches import branches, branches_backward
from esper.kernels.chunk_layout import as_rows
from tests.examples import examples
from tests.kernels.sites import DEVICE, error, make_case

KINDS = ["affine", "low_rank", "mlp_relu", "mlp_gelu", "mlp_silu", "glu", "affine,mlp_gelu,glu"]
BOUND = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-2}


@pytest.fixture(autouse=True)
def poisoned():
    """Every buffer that is not filled holds NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


def objectives(case, share: float = 0.4):
    """Some seeds learn in isolation, those that blend among them too."""
    g = torch.Generator().manual_seed(9)
    isolated = torch.rand(case.alpha.shape[0], generator=g) < share
    return torch.stack([torch.rand(isolated.shape, generator=g), isolated * 0.3], 1).to(DEVICE)


def check(case, x=None, objective=None):
    """Outputs and gradients of one case against the reference in float64, telemetry included."""
    x = case.x if x is None else x
    bound, seeds = BOUND[x.dtype], case.alpha.shape[0]
    dy = torch.randn(x.shape, generator=torch.Generator().manual_seed(4)).to(x)
    rows = as_rows(x)
    y, live, power, health = branches(rows, case.alpha, case.route, objective, case.kinds, case.parameters, True, 0.2)
    dx, grads, residual = branches_backward(rows, dy.reshape(rows.shape), live, objective, case.route, case.kinds, case.parameters)
    wide, x64, dy64 = case.to(torch.float64), x.double().reshape(-1, x.shape[-1]), dy.double().reshape(-1, x.shape[-1])
    ye, le, pe = reference_branches.forward(x64, case.alpha, case.route, case.kinds, wide.parameters)
    dxe, ge, re = reference_branches.backward(x64, dy64, le, objective, case.route, case.kinds, wide.parameters)
    assert torch.equal(live, le)
    assert error(y.reshape(ye.shape), ye) <= bound
    assert error(dx.reshape(ye.shape), dxe) <= bound
    assert error(power, pe) <= 2 * bound
    assert error(residual, re) <= 2 * bound
    assert error(torch.cat([g.flatten() for g in grads]), torch.cat([g.flatten() for g in ge])) <= bound
    assert error(health, reference.telemetry(x64, seeds, 0.2)) <= 1e-4
    idle = untouched(case, x.shape[-1])
    assert torch.equal(y.reshape(ye.shape)[:, idle], x.reshape(-1, x.shape[-1])[:, idle])


def untouched(case, width):
    """Features whose seeds have nothing blended."""
    from esper.kernels.chunk_layout import feature_owner

    idle = (case.route[:, 0] < 0) | (case.alpha == 0)
    return idle[feature_owner(width, case.alpha.shape[0], case.alpha.device)]


@pytest.mark.parametrize("dtype", list(BOUND))
@pytest.mark.parametrize("kinds", KINDS)
def test_outputs_and_gradients_are_the_references(kinds, dtype):
    check(make_case(37, 30, 4, kinds, hidden=20, dtype=dtype))


@pytest.mark.parametrize("kinds", KINDS)
def test_isolated_objectives_share_the_pass(kinds):
    case = make_case(21, 33, 5, kinds, hidden=7)
    check(case, objective=objectives(case))


@pytest.mark.parametrize("kinds", ["mlp_relu", "glu"])
def test_whole_tiles_take_the_unmasked_path(kinds):
    check(make_case(128, 64, 4, kinds, hidden=16, share=1.0))


@pytest.mark.slow
def test_hidden_units_beyond_one_block():
    case = make_case(16, 128, 1, "glu", hidden=256, share=1.0)
    case.alpha.fill_(0.5)
    check(case)
    check(case, objective=torch.tensor([[0.5, 0.1]], device=DEVICE))


@settings(max_examples=examples(6), derandomize=True)
@given(
    rows=st.integers(1, 40), width=st.integers(1, 48), cut=st.floats(0.02, 1.0), kinds=st.sampled_from(KINDS),
    hidden=st.integers(1, 24), dtype=st.sampled_from(list(BOUND)), draw=st.integers(0, 99),
)  # fmt: skip
@pytest.mark.slow
def test_any_shape(rows, width, cut, kinds, hidden, dtype, draw):
    seeds = max(1, int(width * cut))
    check(make_case(rows, width, seeds, kinds, hidden, dtype=dtype, draw=draw))


def test_strided_and_channels_first_input():
    case = make_case(24, 12, 3, "mlp_gelu")
    wide = torch.randn(24, 40, device=DEVICE)
    check(case, x=wide[:, 3:27:2])
    check(case, x=wide[::2, :12])
    check(case, x=torch.randn(2, 12, 3, 4, device=DEVICE).movedim(1, -1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("active", [0, 2, 3, 8])
@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.slow
def test_few_and_many_active_seeds_are_measured_alike(monkeypatch, whole, active, dtype):
    """Up to a quarter of the seeds: whole rows measure all chunks; beyond, and where rows are too wide, active ones measure theirs."""
    if not whole:
        monkeypatch.setattr(launch_rules, "whole_rows", lambda *_: None)
    case = make_case(45, 44, 8, "mlp_relu,affine", hidden=6, share=1.0, dtype=dtype)
    case.alpha.copy_(torch.arange(8) < active)
    check(case)
    check(case, x=(case.x + 30.0).to(dtype))


@pytest.mark.parametrize("active", [1, 5])
def test_health_of_very_many_seeds_takes_a_launch_of_its_own(monkeypatch, active):
    for module in (branches_module, telemetry):
        monkeypatch.setattr(module, "health_group", lambda seeds: (2, 4))
    case = make_case(45, 44, 5, "affine,mlp_relu", hidden=6, share=1.0)
    case.alpha.copy_(torch.arange(5) < active)
    check(case)


@pytest.mark.slow
def test_one_seed_a_feature():
    check(make_case(9, 40, 40, "affine", share=0.5))


def test_a_branch_that_is_not_finite_is_not_felt():
    case = make_case(19, 24, 4, "mlp_relu", share=1.0)
    case.alpha.fill_(0.5)
    case.parameters[0][case.route[1, 1].long()] = float("nan")
    case.alpha[2] = float("inf")
    x, dy = as_rows(case.x), torch.randn(1, 19, 24, device=DEVICE)
    y, live, power, _ = branches(x, case.alpha, case.route, None, case.kinds, case.parameters, False, 0.0)
    dx, grads, _ = branches_backward(x, dy, live, None, case.route, case.kinds, case.parameters)
    assert live.tolist() == [0.5, 0.0, 0.0, 0.5]
    assert torch.equal(y[0, :, 6:18], case.x[:, 6:18])
    assert torch.equal(dx[0, :, 6:18], dy[0, :, 6:18])
    assert y.isfinite().all()
    assert all(g.isfinite().all() for g in grads)
    assert not power[1].isfinite()


def test_float16_that_overflows_is_contained():
    case = make_case(8, 8, 2, "affine", share=1.0, dtype=torch.float16)
    case.alpha.fill_(1.0)
    case.parameters[0].fill_(1e5)
    y, live, _, _ = branches(as_rows(case.x), case.alpha, case.route, None, "affine", case.parameters, False, 0.0)
    assert torch.equal(y[0], case.x)
    assert live.tolist() == [0.0, 0.0]


def test_two_runs_give_the_same_bits():
    case = make_case(50, 30, 4, "affine,glu", dtype=torch.bfloat16)
    x = as_rows(case.x)

    def run():
        y, live, power, health = branches(x, case.alpha, case.route, None, case.kinds, case.parameters, True, 0.1)
        dx, grads, _ = branches_backward(x, x, live, None, case.route, case.kinds, case.parameters)
        return [y, live, power, health, dx, *grads]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def test_offsets_beyond_two_to_the_31():
    """Two rows at a huge stride; the memory between them is mapped but never touched."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    case = make_case(2, 8, 2, "affine", share=1.0, dtype=torch.float16)
    huge = torch.empty(2**31 + 64, dtype=torch.float16, device=DEVICE).as_strided((1, 2, 8), (0, 2**31 + 32, 1))
    huge.copy_(case.x)
    y, *_ = branches(huge, case.alpha, case.route, None, "affine", case.parameters, False, 0.0)
    near, *_ = branches(as_rows(case.x), case.alpha, case.route, None, "affine", case.parameters, False, 0.0)
    assert torch.equal(y, near)


def inputs(case):
    x, parameters = as_rows(case.x).requires_grad_(), [p.requires_grad_() for p in case.parameters]
    return x, case.alpha, case.route, None, case.kinds, parameters, True, 0.1


@pytest.mark.slow
def test_opcheck_passes():
    torch.use_deterministic_algorithms(False)
    torch.library.opcheck(branches, inputs(make_case(6, 8, 2, "affine,low_rank", hidden=2, share=1.0)))


@pytest.mark.slow
def test_compiled_stage_and_alpha_changes_recompile_nothing():
    torch.use_deterministic_algorithms(False)
    case = make_case(12, 16, 4, "mlp_relu", hidden=4, share=1.0)
    x, _, _, _, kinds, parameters, _, _ = inputs(case)

    def step(x, alpha, route, *parameters):
        y, live, _, health = branches(x, alpha, route, None, kinds, list(parameters), True, 0.1)
        return torch.tanh(y), live, health

    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor" if DEVICE == "cuda" else "aot_eager")
    compiled = torch.compile(step, backend=counter, fullgraph=True)
    for alpha, bank in ((0.0, 0), (0.3, 0), (1.0, 0), (1.0, -1)):
        route = case.route.clone()
        route[:2, 0] = bank
        strength = torch.full_like(case.alpha, alpha)
        found, wanted = compiled(x, strength, route, *parameters), step(x, strength, route, *parameters)
        gradient = torch.autograd.grad(found[0].sum(), [x, *parameters])
        expected = torch.autograd.grad(wanted[0].sum(), [x, *parameters])
        for a, b in zip([*found, *gradient], [*wanted, *expected], strict=True):
            assert error(a, b) <= 1e-6
    assert counter.frame_count == 1


def test_a_captured_graph_reads_the_stages_of_the_day():
    """On a GPU the step is captured once and replayed; the CPU calls it again. Either way α is a tensor, read when it runs."""
    case = make_case(16, 16, 4, "mlp_relu", hidden=4, share=1.0)
    x, alpha = as_rows(case.x), torch.zeros(4, device=DEVICE)
    holder = {}

    def step():
        holder["y"] = branches(x, alpha, case.route, None, case.kinds, case.parameters, True, 0.1)[0]

    step()
    replay = step
    if DEVICE == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        replay = graph.replay
    for value in (0.0, 0.5):
        alpha.fill_(value)
        replay()
        expected = reference_branches.forward(case.x, alpha, case.route, case.kinds, case.parameters)[0]
        assert error(holder["y"][0], expected) <= 1e-5


def test_activation_checkpointing_and_autocast():
    case = make_case(12, 16, 4, "mlp_silu", hidden=4, share=1.0)
    x, alpha, route, _, kinds, parameters, _, _ = inputs(case)

    def step(x):
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            return branches(torch.nn.functional.linear(x, torch.eye(16, device=DEVICE)), alpha, route, None, kinds, parameters, False, 0.0)[
                0
            ]

    plain = torch.autograd.grad(step(x).float().sum(), [x, *parameters])
    again = torch.autograd.grad(torch.utils.checkpoint.checkpoint(step, x, use_reentrant=False).float().sum(), [x, *parameters])
    assert step(x).dtype == torch.bfloat16
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_the_interpreter_is_what_ran_where_there_is_no_gpu():
    assert DEVICE == "cuda" or os.environ["TRITON_INTERPRET"] == "1"
