"""Which path is taken, what is said about it, and what a canary does."""

import logging

import pytest
import torch

from esper.errors import UserError
from esper.kernels import KernelConfig, Kernels, dispatch, reference_branches
from tests.kernels.sites import DEVICE, make_case


def test_auto_says_once_that_it_takes_torch(monkeypatch, caplog):
    monkeypatch.setattr(dispatch, "missing", lambda *_: "no CUDA GPU was found")
    monkeypatch.setattr(dispatch, "_said", set())
    with caplog.at_level(logging.INFO, "esper.kernels"):
        first, _ = Kernels(KernelConfig("auto")), Kernels(KernelConfig("auto"))
    assert [record.message for record in caplog.records] == ["kernel=auto takes plain torch: no CUDA GPU was found."]
    assert first.path("site", torch.ones(2, 4)) == "torch"


def test_triton_refuses_in_one_sentence(monkeypatch):
    monkeypatch.setattr(dispatch, "missing", lambda *_: "Triton is not installed")
    with pytest.raises(UserError, match=r"^kernel=triton was asked for, but Triton is not installed; use kernel=auto"):
        Kernels(KernelConfig("triton"))


def test_triton_refuses_a_model_on_the_cpu_of_a_machine_with_a_gpu(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    Kernels(KernelConfig("triton"), torch.device("cuda"))
    with pytest.raises(UserError, match=r"^kernel=triton was asked for, but the model is on the CPU"):
        Kernels(KernelConfig("triton"), torch.device("cpu"))


def run(kernels, case):
    return kernels.branches("site", case.x, case.alpha, case.route, case.kinds, case.parameters, near_zero=0.1)


def test_both_paths_return_the_same():
    case = make_case(15, 24, 4, "mlp_gelu,affine")
    found, wanted = run(Kernels(KernelConfig("triton")), case), run(Kernels(KernelConfig("torch")), case)
    for name in ("y", "live", "power", "health"):
        torch.testing.assert_close(getattr(found, name), getattr(wanted, name), rtol=1e-4, atol=1e-5)


def test_wide_chunks_and_empty_batches_take_torch():
    kernels = Kernels(KernelConfig("triton"))
    assert not dispatch.fits(300, 2, "affine", [])
    assert kernels.path("site", torch.empty(0, 4, device=DEVICE)) == "torch"
    assert run(kernels, make_case(0, 24, 4, "affine")).y.shape == (0, 24)


def test_rollout_is_stable_and_every_feature_picks_its_own_cohort():
    names = [f"layer.{i}" for i in range(400)]
    kernel = {n for n in names if dispatch.chosen_by_hash("kernel", n, 0.5)}
    other = {n for n in names if dispatch.chosen_by_hash("canary", n, 0.5)}
    assert 150 < len(kernel) < 250
    assert 60 < len(kernel & other) < 140
    assert kernel >= {n for n in names if dispatch.chosen_by_hash("kernel", n, 0.1)}
    assert {n for n in names if dispatch.chosen_by_hash("kernel", n, 1.0)} == set(names)


def test_a_canary_that_agrees_stays_silent():
    kernels = Kernels(KernelConfig("triton", canary=1.0))
    kernels.begin(3)
    run(kernels, make_case(15, 24, 4, "mlp_gelu"))
    assert kernels.alerts == []
    assert not kernels.tripped


def test_a_canary_that_disagrees_falls_back_for_the_rest_of_the_run(monkeypatch, caplog):
    case, kernels = make_case(15, 24, 4, "mlp_gelu", share=1.0), Kernels(KernelConfig("triton", canary=1.0))
    wrong = lambda x, *rest: (x * 2, torch.ones(4, device=DEVICE), torch.ones(4, device=DEVICE))  # noqa: E731
    kernels.begin(3)
    with monkeypatch.context() as patch:
        patch.setattr(reference_branches, "forward", wrong)
        answer = run(kernels, case)
    assert torch.equal(answer.y, case.x * 2), "the step at which it showed already has the reference's answer"
    assert len(kernels.alerts) == 1
    assert "plain torch from here on" in kernels.alerts[0]
    assert kernels.path("site", case.x) == "torch"
    assert any(record.levelno == logging.ERROR for record in caplog.records)


@pytest.mark.parametrize("part", [0, 1])
def test_a_canary_looks_at_the_backward_too(monkeypatch, part):
    case, kernels = make_case(15, 24, 4, "mlp_gelu", share=1.0), Kernels(KernelConfig("triton", canary=1.0))
    right = reference_branches.backward

    def wrong(*words):
        dx, gradients, residual = right(*words)
        return (dx * 1.5, gradients, residual) if part == 0 else (dx, [gradient * 0.0 for gradient in gradients], residual)

    kernels.begin(3)
    monkeypatch.setattr(reference_branches, "backward", wrong)
    run(kernels, case)
    assert len(kernels.alerts) == 1 and "gradient" in kernels.alerts[0] and kernels.tripped


def test_a_canary_does_not_take_autocast_for_a_mistake():
    kernels = Kernels(KernelConfig("triton", canary=1.0))
    kernels.begin(3)
    with torch.autocast(torch.device(DEVICE).type, dtype=torch.bfloat16):
        run(kernels, make_case(15, 24, 4, "mlp_gelu", share=1.0))
    assert kernels.alerts == []


def test_canary_ticks_are_a_fixed_fraction():
    kernels, due = Kernels(KernelConfig("triton", canary=0.01)), []
    for tick in range(5000):
        kernels.begin(tick)
        due.append(kernels.checking)
    assert 25 <= sum(due) <= 80
