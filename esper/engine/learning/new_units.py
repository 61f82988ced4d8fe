"""Start values of new hidden units that depend on the host: as large as its present weights, or along the loss's gradient.

``gradmax`` (Evci et al. 2022, "GradMax: growing neural networks using gradient information"): with incoming weights of zero nothing
changes, and the outgoing ones are those that make the gradient of the incoming ones as large as it can be. ``tiny`` (Verbockhaven et al.
2024, "Growing tiny networks"): the directions in which the layer's output should move and the present units cannot move it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from esper.blueprints import SlotBank, Width
from esper.engine.extra_passes import shapes_of, untouched_buffers
from esper.errors import UserError
from esper.seeds import Branch
from esper.seeds.hidden_layers import LAYERS

if TYPE_CHECKING:
    from esper.engine.measurements import Measurements

SMALLEST = 1e-6
"""Eigenvalues below this share of the largest are taken for zero."""
LEVEL = ("relu",)
"""Activations whose slope at zero is none."""


class Seen(NamedTuple):
    """One batch at a hidden layer, float64: what it reads ``[R, Cin]``, what it gives ``[R, H]``, the gradient behind it ``[R, C]``."""

    read: Tensor
    hidden: Tensor
    gradient: Tensor


def gradmax(seen: Seen, units: int) -> Tensor:
    """Outgoing weights ``[units, C]``, of length 1 each: the first left singular vectors of ``Σ gradient·readᵀ``.

    Over all outgoing weights of this size they give the largest gradient of incoming weights that are zero.
    """
    left = torch.linalg.svd(seen.gradient.mT @ seen.read, full_matrices=False)[0]
    return _signed(left[:, :units].mT)


def tiny(seen: Seen, units: int) -> tuple[Tensor, Tensor]:
    """Incoming ``[Cin, units]`` and outgoing ``[units, C]`` weights whose product comes nearest to what is wanted and not reached.

    Wanted is minus the gradient; the part that the present units can give, by least squares, is taken off. Of the rest the best
    approximation of rank ``units`` by a linear function of what the layer reads is found, nearest over the batch.
    """
    present = torch.cat([seen.hidden, seen.hidden.new_ones(len(seen.hidden), 1)], 1)
    wanted = -seen.gradient
    rest = wanted - present @ (_inverse(present.mT @ present, 1.0) @ (present.mT @ wanted))
    root = _inverse(seen.read.mT @ seen.read, 0.5)
    left, sizes, right = torch.linalg.svd(root @ (seen.read.mT @ rest), full_matrices=False)
    scale = sizes[:units].sqrt()
    return root @ left[:, :units] * scale, right[:units] * scale.unsqueeze(1)


def _inverse(square: Tensor, power: float) -> Tensor:
    """``square^(−power)`` of a symmetric matrix with no negative eigenvalues, zero where these are."""
    values, vectors = torch.linalg.eigh(square)
    real = values > SMALLEST * values.max().clamp(min=0.0)
    scale: Tensor = torch.where(real, values.clamp(min=1e-300).pow(-power), 0.0)
    inverse: Tensor = (vectors * scale) @ vectors.mT
    return inverse


def _signed(rows: Tensor) -> Tensor:
    """The same rows with their largest entry positive: a singular vector's sign says nothing."""
    largest = rows.abs().argmax(1, keepdim=True)
    signs: Tensor = rows.gather(1, largest).sign()
    return rows * signs


class NewUnits:
    """Sets the start values of branches of ``width`` when they germinate."""

    def __init__(self, measurements: Measurements) -> None:
        self.measurements = measurements
        self.registry = measurements.registry

    @torch.no_grad()
    def prepare(self, branch: Branch) -> None:
        """Start values of a new branch, in its bank; of other blueprints nothing is touched.

        Raises:
            UserError: more units than there are directions, an activation that has none, or no batch to see them on.
        """
        bank, site = self.registry.layers[branch.site].bank(branch.blueprint), self.registry.sites[branch.site]
        if not isinstance(bank, SlotBank) or not isinstance(bank.blueprint, Width):
            return
        assert site.hidden is not None and isinstance(site.module, LAYERS)
        first, second = site.hidden.module.weight.double(), site.module.weight.double()
        rows, columns = first.flatten(1).norm(dim=1).mean(), second.transpose(0, 1).flatten(1).norm(dim=1).mean()
        w1, w2 = bank.stacks["w1"][branch.slot], bank.stacks["w2"][branch.slot]
        blueprint = bank.blueprint
        if blueprint.start in ("gradmax", "tiny"):
            self._directed(blueprint, w1, w2, branch, float(rows), float(columns))
        elif blueprint.spread == "host":
            w1.mul_(first.std() / w1.std(correction=0).clamp(min=1e-12))
            if bool(w2.any()):
                w2.mul_(second.std() / w2.std(correction=0).clamp(min=1e-12))

    def _directed(self, blueprint: Width, w1: Tensor, w2: Tensor, branch: Branch, rows: float, columns: float) -> None:
        level = blueprint.activation in LEVEL
        units = blueprint.units // 2 if level else blueprint.units
        if level and (blueprint.start == "gradmax" or blueprint.units % 2):
            raise UserError(
                f"blueprint.start=gradmax needs an activation with a slope at zero, and {blueprint.activation} has none: use start=tiny."
                if blueprint.start == "gradmax"
                else f"blueprint.start=tiny takes units of {blueprint.activation} in pairs, and blueprint.units={blueprint.units} is odd."
            )
        if units > min(w1.shape[0], w2.shape[1]):
            most = min(w1.shape[0], w2.shape[1]) * (2 if level else 1)
            raise UserError(
                f"blueprint.start={blueprint.start} has {most} directions here, and blueprint.units={blueprint.units} asks for more."
            )
        seen = self._look(branch)
        if blueprint.start == "gradmax":
            w1.zero_()
            w2.copy_(gradmax(seen, units) * columns)
            return
        incoming, outgoing = tiny(seen, units)
        incoming, outgoing = incoming * (rows / _longest(incoming.mT)), outgoing * (columns / _longest(outgoing))
        if level:  # relu(z) − relu(−z) = z
            incoming, outgoing = torch.cat([incoming, -incoming], 1), torch.cat([outgoing, -outgoing])
        w1.copy_(incoming)
        w2.copy_(outgoing)

    def _look(self, branch: Branch) -> Seen:
        """The step's last batch once more, forward and backward, with the same dropout masks."""
        passes, batch, site = self.measurements.passes, self.measurements.batch, self.registry.sites[branch.site]
        if batch is None:
            raise UserError("New units along the gradient need a batch to see it on: call after_backward before tick.")
        assert site.hidden is not None
        held: dict[str, Tensor] = {}

        def read(module: nn.Module, inputs: Any) -> None:
            held["read"] = inputs[0].detach()

        def answered(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            held["hidden"], held["probe"] = inputs[0].detach(), torch.zeros_like(output).requires_grad_()
            return output + held["probe"]

        handles = [site.hidden.module.register_forward_pre_hook(read), site.module.register_forward_hook(answered)]
        model, key = self.registry.model, ("directions", self.registry.cost_key(), shapes_of(batch))
        try:
            with (
                passes.replay.again(),
                untouched_buffers(model),
                passes.silent(),
                torch.enable_grad(),
                passes.meter.counting("objective", key),
            ):
                (gradient,) = torch.autograd.grad(passes.loss(model, batch).mean(), held["probe"])
        finally:
            for handle in handles:
                handle.remove()
        return Seen(*(value.flatten(0, -2).double() for value in (held["read"], held["hidden"], gradient)))


def _longest(rows: Tensor) -> float:
    return max(float(rows.norm(dim=1).max()), 1e-300)
