"""Directions from the gradient for new hidden units (GradMax, TINY), against plain torch in float64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from growing import HOSTS, batch, sample_loss
from torch import Tensor, nn

from esper.blueprints import Width
from esper.engine.learning.new_units import Seen, gradmax, tiny
from tests.engine.widening import deep, grown, plain_loss


@pytest.fixture(autouse=True)
def _hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(HOSTS, "deep", deep)


def seen_at(model: nn.Module, data: tuple[Tensor, Tensor]) -> Seen:
    """What ``b`` of the deep host reads and answers, by plain hooks."""
    held: dict[str, Any] = {}
    model.a.register_forward_pre_hook(lambda _, inputs: held.update(read=inputs[0].detach()))

    def answered(_: nn.Module, inputs: Any, output: Tensor) -> None:
        output.retain_grad()
        held.update(hidden=inputs[0].detach(), output=output)

    model.b.register_forward_hook(answered)
    plain_loss(model, data).backward()
    return Seen(held["read"], held["hidden"], held["output"].grad)


def test_gradmax_makes_the_gradient_of_incoming_weights_as_large_as_it_can_be() -> None:
    model = deep().double().eval()
    data = batch("mlp", 5, 64)
    seen, length = seen_at(model, data), 1.3

    def gradient_norm(outgoing: Tensor) -> float:
        """Of zero incoming weights, in a really wider net."""
        wide: Any = copy.deepcopy(model)
        incoming = torch.zeros(6, 2, dtype=torch.float64, requires_grad=True)
        wide.b.register_forward_hook(lambda _, __, output: output + torch.tanh(held["x"] @ incoming) @ outgoing)
        held: dict[str, Tensor] = {}
        wide.a.register_forward_pre_hook(lambda _, inputs: held.update(x=inputs[0]))
        plain_loss(wide, data).backward()
        return float(incoming.grad.norm())

    best = gradient_norm(gradmax(seen, 2) * length)
    sizes = torch.linalg.svdvals(seen.gradient.mT @ seen.read)
    assert best == pytest.approx(length * float(sizes[:2].square().sum().sqrt()), rel=1e-9)
    draws = torch.Generator().manual_seed(1)
    for _ in range(20):
        other = torch.linalg.qr(torch.randn(4, 2, dtype=torch.float64, generator=draws))[0].mT * length
        assert gradient_norm(other) <= best * (1 + 1e-12)


def test_tiny_is_the_best_low_rank_answer_to_what_the_present_units_cannot_do() -> None:
    draws = torch.Generator().manual_seed(2)
    read, hidden, gradient = (torch.randn(50, width, dtype=torch.float64, generator=draws) for width in (6, 5, 4))
    incoming, outgoing = tiny(Seen(read, hidden, gradient), 2)
    present = torch.cat([hidden, torch.ones(50, 1, dtype=torch.float64)], 1)
    rest = -gradient - present @ torch.linalg.lstsq(present, -gradient).solution
    assert float((present.mT @ rest).abs().max()) < 1e-10
    error = float((rest - read @ incoming @ outgoing).norm())
    full = read @ torch.linalg.lstsq(read, rest).solution
    left, sizes, right = torch.linalg.svd(full, full_matrices=False)
    best = (left[:, :2] * sizes[:2]) @ right[:2]  # reduced-rank regression: the fit, cut to rank 2
    assert error == pytest.approx(float((rest - best).norm()), rel=1e-9)


@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_new_units_along_the_gradient_lower_the_loss_more_than_drawn_ones(activation: str) -> None:
    host, site = ("deep", "b") if activation == "gelu" else ("mlp", "fc2")
    slopes = {}
    for start in ("tiny", "paired"):
        loop = grown(host, Width(units=4, start=start, spread="host"), site)
        loop.run(3)
        bank, (branch,) = loop.grow.registry.layers[0].bank("width"), loop.grow.registry.branches.entries
        if start == "paired":
            with torch.no_grad():
                bank.stacks["w2"][branch.slot, 2:] *= 0.5  # else the pair is silent
        data, registry = loop.batch(2), loop.grow.registry
        loop.run(2)
        losses = []
        for alpha in (0.0, 0.02):
            registry.branches.alpha[branch.id] = alpha
            registry.set_alphas({0})
            losses.append(float(sample_loss(loop.model.eval(), data).mean().detach()))
        slopes[start] = losses[1] - losses[0]
    assert slopes["tiny"] < 0.0 and slopes["tiny"] < slopes["paired"]


@pytest.mark.parametrize(
    ("blueprint", "host", "site", "reason"),
    [
        (Width(units=4, start="gradmax"), "mlp", "fc2", "needs an activation with a slope at zero, and relu has none"),
        (Width(units=5, start="tiny"), "mlp", "fc2", "takes units of relu in pairs"),
        (Width(units=9, start="gradmax"), "deep", "b", "has 4 directions here, and blueprint.units=9 asks for more"),
    ],
)
def test_directions_that_there_are_not_are_refused(blueprint: Width, host: str, site: str, reason: str) -> None:
    loop = grown(host, blueprint, site).run(4)
    status, said = loop.port.acks[f"germinate-{site}-0"]
    assert status == "refused" and reason in said and not loop.grow.registry.branches.entries
    loop.run(3)
