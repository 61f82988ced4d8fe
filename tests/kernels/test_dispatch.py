"""Which path is taken, what is said about it, and what a canary does."""

import importlib
import logging

import pytest
import torch

from esper.errors import UserError
from esper.feature_flags import Flags, FlagsConfig, KernelFlag, chosen_by_hash
from esper.kernels import MISMATCH, KernelConfig, Kernels, dispatch, reference, reference_branches
from tests.kernels.sites import DEVICE, make_case


def test_auto_says_once_that_it_takes_torch(monkeypatch, caplog):
    monkeypatch.setattr(dispatch, "unavailable_reason", lambda *_: "no CUDA GPU was found")
    monkeypatch.setattr(dispatch, "_said", set())
    with caplog.at_level(logging.INFO, "esper.kernels"):
        first, _ = Kernels(KernelConfig("auto")), Kernels(KernelConfig("auto"))
    assert [record.message for record in caplog.records] == ["kernel=auto takes plain torch: no CUDA GPU was found."]
    assert first.path("site", torch.ones(2, 4)) == "torch"


def test_triton_refuses_in_one_sentence(monkeypatch):
    monkeypatch.setattr(dispatch, "unavailable_reason", lambda *_: "Triton is not installed")
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


def test_the_flag_says_at_which_sites_and_a_change_of_it_elsewhere_costs_no_path():
    flags = Flags(FlagsConfig(kernels=KernelFlag(percent=50.0, block=["layer.7"])))
    kernels, x = Kernels(KernelConfig("triton"), flags=flags), torch.ones(2, 4, device=DEVICE)
    taken = {n for n in range(100) if kernels.path(f"layer.{n}", x) == "triton"}
    assert taken == {n for n in range(100) if n != 7 and chosen_by_hash("kernels", f"layer.{n}", 0.5)} and 30 < len(taken) < 70


@pytest.mark.parametrize("where", ["branches", "telemetry"])
def test_a_kernel_that_raises_is_answered_by_the_reference_and_torch_takes_over(where, monkeypatch, caplog):
    def broken(*_):
        raise RuntimeError("no\nregisters left")

    case, kernels = make_case(15, 24, 4, "mlp_gelu"), Kernels(KernelConfig("triton"))
    wanted = run(Kernels(KernelConfig("torch")), case) if where == "branches" else reference.telemetry(case.x, 4, 0.1)
    monkeypatch.setattr(importlib.import_module(f"esper.kernels.{where}"), where, broken)
    found = run(kernels, case) if where == "branches" else kernels.telemetry("site", case.x, 4, 0.1)
    assert torch.equal(found.y, wanted.y) if where == "branches" else torch.equal(found, wanted)
    text = "a kernel at site raised RuntimeError: no registers left; plain torch from here on"
    assert kernels.alerts == [("kernel_failed", text)]
    assert kernels.path("another", case.x) == "torch" and caplog.records[-1].exc_info is not None


def test_full_memory_is_no_failure_of_a_kernel(monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(importlib.import_module("esper.kernels.branches"), "branches", full)
    with pytest.raises(torch.OutOfMemoryError):
        run(Kernels(KernelConfig("triton")), make_case(15, 24, 4, "mlp_gelu"))


def test_a_flag_may_say_that_no_failure_counts(monkeypatch):
    kernels = Kernels(KernelConfig("triton"), flags=Flags(FlagsConfig(kernels=KernelFlag(failures=0))))
    monkeypatch.setattr(importlib.import_module("esper.kernels.branches"), "branches", lambda *_: 1 / 0)
    for _ in range(3):
        run(kernels, make_case(15, 24, 4, "mlp_gelu"))
    assert [text.partition("; ")[2] for _, text in kernels.alerts] == ["this call has the answer of plain torch"], "said once a site"
    assert kernels.path("site", torch.ones(2, 4, device=DEVICE)) == "triton"


def test_a_canary_that_agrees_stays_silent():
    kernels = Kernels(KernelConfig("triton", canary=1.0))
    kernels.begin_tick(3)
    run(kernels, make_case(15, 24, 4, "mlp_gelu"))
    assert kernels.alerts == []
    assert kernels.path("site", torch.ones(2, 4, device=DEVICE)) == "triton"


def test_a_canary_that_disagrees_falls_back_for_the_rest_of_the_run(monkeypatch, caplog):
    case, kernels = make_case(15, 24, 4, "mlp_gelu", share=1.0), Kernels(KernelConfig("triton", canary=1.0))
    wrong = lambda x, *rest: (x * 2, torch.ones(4, device=DEVICE), torch.ones(4, device=DEVICE))  # noqa: E731
    kernels.begin_tick(3)
    with monkeypatch.context() as patch:
        patch.setattr(reference_branches, "forward", wrong)
        answer = run(kernels, case)
    assert torch.equal(answer.y, case.x * 2), "the step at which it showed already has the reference's answer"
    assert len(kernels.alerts) == 1
    assert kernels.alerts[0][0] == MISMATCH and "plain torch from here on" in kernels.alerts[0][1]
    assert kernels.path("site", case.x) == "torch"
    assert any(record.levelno == logging.ERROR for record in caplog.records)


@pytest.mark.parametrize("part", [0, 1])
def test_a_canary_looks_at_the_backward_too(monkeypatch, part):
    case, kernels = make_case(15, 24, 4, "mlp_gelu", share=1.0), Kernels(KernelConfig("triton", canary=1.0))
    right = reference_branches.backward

    def wrong(*words):
        dx, gradients, residual = right(*words)
        return (dx * 1.5, gradients, residual) if part == 0 else (dx, [gradient * 0.0 for gradient in gradients], residual)

    kernels.begin_tick(3)
    monkeypatch.setattr(reference_branches, "backward", wrong)
    run(kernels, case)
    assert len(kernels.alerts) == 1 and "gradient" in kernels.alerts[0][1] and kernels.path("site", case.x) == "torch"


def test_a_canary_does_not_take_autocast_for_a_mistake():
    kernels = Kernels(KernelConfig("triton", canary=1.0))
    kernels.begin_tick(3)
    with torch.autocast(torch.device(DEVICE).type, dtype=torch.bfloat16):
        run(kernels, make_case(15, 24, 4, "mlp_gelu", share=1.0))
    assert kernels.alerts == []


def test_canary_ticks_are_a_fixed_fraction():
    kernels, due = Kernels(KernelConfig("triton", canary=0.01)), []
    for tick in range(5000):
        kernels.begin_tick(tick)
        due.append(kernels.canary_due)
    assert 25 <= sum(due) <= 80
