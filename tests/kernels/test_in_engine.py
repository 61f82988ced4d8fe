"""A whole run with the kernels: the engine behind them, their canary's alert on the bus, and what a resumed run remembers of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from esper.blueprints import MLP
from esper.kernels import MISMATCH, KernelConfig, dispatch
from tests.growing import Loop, germinate
from tests.kernels.sites import DEVICE


def loop(kernel: Any, **more: Any) -> Loop:
    """The small host with one chunk branch, from tick 2 on."""
    settings = {"kernel": kernel, "blueprint": MLP(receptive_field="chunk", hidden=4), "sites": ["fc1"], **more}
    return Loop(commands={2: [germinate()]}, settings=settings, device=DEVICE)


@pytest.mark.slow
def test_a_branch_lives_the_same_life_behind_the_kernels() -> None:
    plain, fused = loop("torch"), loop(KernelConfig("triton", canary=1.0))
    losses = [[one.step() for _ in range(16)] for one in (plain, fused)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert fused.port.stages() == plain.port.stages() and ("TRAINING", "GRAFTING") in fused.port.stages()
    assert not fused.port.alerts


def test_a_mismatch_is_an_alert_on_the_bus_and_outlives_a_restart(monkeypatch: pytest.MonkeyPatch) -> None:
    run = loop(KernelConfig("triton", canary=1.0))
    monkeypatch.setitem(dispatch.TOLERANCE, torch.float32, -1.0)
    run.run(12)
    alerts = [words for words in run.port.alerts if words.code == MISMATCH]
    assert len(alerts) == 1 and alerts[0].level == "error" and "plain torch from here on" in alerts[0].text
    state = run.grow.state()
    before_flags = {**state, "grow": {key: value for key, value in state["grow"].items() if key != "flags"} | {"said": [MISMATCH]}}
    for saved in (state, before_flags):
        kernels = loop(KernelConfig("triton", canary=1.0), state=saved).grow.registry.kernels
        assert kernels is not None and kernels.path("fc1", torch.ones(2, 8, device=DEVICE)) == "torch"
