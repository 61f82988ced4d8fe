"""The meter's MACs equal what torch's own counter saw of the same run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from growing import Loop, Net, batch, germinate, sample_loss, short
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from esper.blueprints import Affine, Conv
from esper.engine.attach import attach
from esper.engine.costs import Meter
from esper.lifecycle import Stage

S = Stage


class _Paused(Meter):
    """A meter that only rehearses outside of the independent count."""

    outer: FlopCounterMode | None = None
    rehearsed = 0

    @contextmanager
    def learning(self, kind: str, key: Any) -> Iterator[None]:
        """As ever; what was run only to be counted is taken out of the independent count."""
        assert self.outer is not None
        before = self.outer.get_total_flops()
        with super().learning(kind, key):
            yield
        self.rehearsed += self.outer.get_total_flops() - before


def counted(loop: Loop, steps: int) -> tuple[int, int]:
    """(the meter's, the independent counter's) MACs of some steps."""
    meter = _Paused()
    for owner in (loop.grow, loop.grow.passes, loop.grow.objective, loop.grow.judge):
        owner.meter = meter
    with FlopCounterMode(display=False) as outer:
        meter.outer = outer
        for _ in range(steps):
            loop.step(*(batch(loop.host, loop.step_number * 4 + i) for i in range(loop.accumulate)))
    loop.grow.meter = meter
    return meter.total, (outer.get_total_flops() - meter.rehearsed) // 2


CASES: dict[str, dict[str, Any]] = {
    "shadow": {},
    "accumulate": {"accumulate": 2},
    "performance": {"settings": {"grafting": "performance", "lifecycle": short(grafting_max="90step")}},
    "functional_gradient": {
        "settings": {"lifecycle": short(objective="functional_gradient", training_min="60step", training_max="80step")}
    },
    "reconstruction": {"settings": {"lifecycle": short(objective="reconstruction")}},
    "chunk": {"settings": {"blueprint": Affine(receptive_field="layer")}},
    "norms": {"host": "cnn_batch"},
    "conv": {"host": "cnn_group", "settings": {"blueprint": Conv()}},
    "transformer": {"host": "transformer"},
    "block": {"host": "transformer", "settings": {"blueprint": "block"}},
}


@pytest.mark.parametrize("case", list(CASES))
@pytest.mark.slow
def test_all_passes_of_a_run_are_counted_and_nothing_else(case: str):
    loop = Loop(total=120, **CASES[case])
    names = [site.name for site in loop.grow.registry.sites]
    seeds = min(2, loop.grow.registry.sites[0].geometry.seeds)
    loop.port.script = {2: [germinate(names[0])], 4: [germinate(names[-1], seeds - 1)] if len(names) > 1 else []}
    mine, independent = counted(loop, 22)
    assert mine == independent > 0
    stages = {target for _, target in loop.port.stages()}
    expected = {"functional_gradient": "TRAINING"}.get(case, "STABILIZATION")
    assert expected in stages, stages
    kinds = set(loop.grow.meter.spent)
    assert "step" in kinds
    if case == "shadow":
        assert kinds == {"step", "shadow", "judge"}


def test_two_registries_of_the_same_size_are_not_mistaken_for_each_other():
    """One TRAINING seed at fc1 costs another shadow forward than one at fc2."""
    loop = Loop(settings={"lifecycle": short(training_max="4step", readiness=1.0)})
    loop.port.script = {1: [germinate("fc1")], 9: [germinate("fc2", blueprint="glu")]}
    mine, independent = counted(loop, 16)
    assert mine == independent
    assert loop.port.stages().count(("TRAINING", "CULLED")) == 2


def test_the_bare_host_costs_what_its_shapes_say():
    loop = Loop()
    loop.run(3)
    rows, weights = 12, 6 * 8 + 8 * 7 + 7 * 3
    per_step = rows * (weights * 3 - 6 * 8)  # forward, weight gradients, and input gradients but the data's
    assert loop.grow.meter.spent == {"step": 3 * per_step}
    assert loop.grow.meter.cost("step", next(iter(loop.grow.meter._known))[1]) == per_step


class Asking(Net):
    """A host that hands a parameter of its own to a submodule: a learned query."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.reads = nn.Parameter(torch.ones(2, 8)), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, 6] → [N, 3]``."""
        hidden = torch.relu(self.fc1(x)) * self.reads(self.query).mean(0)
        return self.head(torch.relu(self.fc2(hidden)))


@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm", "query"])
def test_hosts_that_hand_their_parameters_to_submodules_are_counted_as_torch_counts_them(kind: str):
    torch.manual_seed(0)
    model = Asking() if kind == "query" else Net()
    if kind != "query":
        getattr(nn.utils.parametrizations, kind)(model.fc1)
    with FlopCounterMode(display=False) as counter:
        sample_loss(model, batch()).mean().backward()
    grow = attach(model, loss=sample_loss, judge=[batch()], total_steps=400, sites="fc2", per_site=1, lifecycle=short())
    grow.after_backward(batch())
    assert grow.meter.total == counter.get_total_flops() // 2 > 0


def test_counting_can_be_left_out():
    loop = Loop(settings={"count_macs": False}).run(3)
    assert loop.grow.meter.total == 0
