"""``block``: a whole residual block (depth growth) beside a residual block of the host: δ(y) = B(y) − y.

``B`` starts as a copy of the host's block, as a copy whose output is silenced, or fresh with a silenced output. Under the
α ramp all three change nothing at first. Growing by copies is the depth growth of Gong et al. 2019 and G_stack (Du et al. 2024).
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from esper.blueprints.block_call import PLAIN_CALL
from esper.blueprints.config import BlockSettings
from esper.blueprints.geometry import Geometry
from esper.errors import UserError


@dataclass
class Block(BlockSettings):
    """Depth growth; ``output_layers`` names the layers whose zeroing makes the block the identity (else the host says)."""

    def misfit(self, geometry: Geometry) -> str | None:
        """Only modules that map their input to its own shape."""
        return None if geometry.residual else "block needs a residual block (a module whose output has its input's shape)"

    def silencing_misfit(self, block: nn.Module) -> str | None:
        """Why the block's output cannot be put at zero as ``start`` asks, or None."""
        if self.start == "copy":
            return None
        names, there = self._outputs(block), dict(block.named_modules())
        if not names:
            return (
                f"block with start={self.start} must know which layers of {type(block).__name__} write its output; "
                "set blueprint.output_layers=[…] or give the module an attribute output_layers"
            )
        missing = [name for name in names if name not in there]
        return f"{type(block).__name__} has no layer '{missing[0]}' to put at zero" if missing else None

    def silence(self, block: nn.Module) -> None:
        """Zero the parameters of the block's last layers; raises UserError where it is not known which they are."""
        reason = self.silencing_misfit(block)
        if reason is not None:
            raise UserError(f"{reason}.")
        with torch.no_grad():
            for name in self._outputs(block):
                for parameter in block.get_submodule(name).parameters():
                    parameter.zero_()

    def _outputs(self, block: nn.Module) -> list[str]:
        return list(self.output_layers) or list(getattr(block, "output_layers", ()))

    def build(self, site: nn.Module, generator: torch.Generator) -> nn.Module:
        """A new block for this site, on its device."""
        block = copy.deepcopy(site)
        for parameter in block.parameters():
            parameter.requires_grad_(True)
            parameter.grad = None
        if self.start == "fresh":
            _redraw(block, generator)
        if self.start != "copy":
            self.silence(block)
        return block


def _redraw(block: nn.Module, generator: torch.Generator) -> None:
    """Draw new values for every matrix in ±1/√fan_in; vectors return to one (norm scales) or zero."""
    with torch.no_grad():
        for module in block.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.dim() > 1:
                    bound = 1.0 / math.sqrt(math.prod(parameter.shape[1:]))
                    parameter.copy_(torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator))
                else:
                    parameter.fill_(1.0 if "norm" in type(module).__name__.lower() and name == "weight" else 0.0)


class BlockBank(nn.Module):
    """The grown blocks of one site; a slot is a module of its own, with its optimizer moments beside it."""

    def __init__(self, blueprint: Block, site: nn.Module, device: torch.device) -> None:
        super().__init__()
        self.blueprint = blueprint
        self.blocks = nn.ModuleDict()
        self.moments: dict[str, dict[str, tuple[Tensor, Tensor]]] = {}
        self.steps: dict[str, int] = {}
        self.call = PLAIN_CALL
        self._site = [site]  # in a list: the host's block must not become a child of its own growth
        self._next = 0

    def allocate(self, seed: int, generator: torch.Generator, silent: bool) -> int:
        """Build a block; returns its slot (slots are never reused). ``silent`` is the blueprint's own choice of start."""
        slot, self._next = self._next, self._next + 1
        key = str(slot)
        self.blocks[key] = self.blueprint.build(_bare(self._site[0]), generator)
        zeros = {name: torch.zeros_like(value) for name, value in self.blocks[key].named_parameters()}
        self.moments[key] = {name: (zero, zero.clone()) for name, zero in zeros.items()}
        self.steps[key] = 0
        return slot

    def free(self, slot: int) -> None:
        """Drop the block and its moments."""
        key = str(slot)
        del self.blocks[key], self.moments[key], self.steps[key]

    def state(self) -> dict[str, Any]:
        """All blocks, parameters and buffers, with their moments and steps, by reference."""
        return {
            "next": self._next,
            "blocks": {key: _tensors(block) for key, block in self.blocks.items()},
            "moments": {key: {name: list(pair) for name, pair in held.items()} for key, held in self.moments.items()},
            "steps": dict(self.steps),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Take over a saved state. Raises ValueError where its tensors are not those of the site's block."""
        self.blocks, self.moments, self.steps = nn.ModuleDict(), {}, {}
        self._next = int(state["next"])
        for key, saved in state["blocks"].items():
            block = _bare(self._site[0])
            own, moments = _tensors(block), state["moments"][key]
            if {name: value.shape for name, value in own.items()} != {name: value.shape for name, value in saved.items()}:
                raise ValueError(f"the saved block {key} is not built like the host's")
            with torch.no_grad():
                for name, value in own.items():
                    value.copy_(saved[name])
            for parameter in block.parameters():
                parameter.requires_grad_(True)
                parameter.grad = None
            self.blocks[key], self.steps[key] = block, int(state["steps"][key])
            self.moments[key] = {
                name: (moments[name][0].to(value.device), moments[name][1].to(value.device)) for name, value in block.named_parameters()
            }

    def delta(self, slot: int, y: Tensor, learning: bool) -> Tensor:
        """``B(y) − y``, called as the host last called its own; without ``learning`` no gradient flows to the block's parameters."""
        block = self.blocks[str(slot)]
        frozen = None if learning else {name: value.detach() for name, value in block.named_parameters()}
        return self.call.answer(block, y, frozen) - y

    def scale_gradient(self, slot: int, factor: float) -> None:
        """Multiply one block's gradients (undoing a loss scale)."""
        for parameter in self.blocks[str(slot)].parameters():
            if parameter.grad is not None:
                parameter.grad *= factor

    def parameters_of(self, slot: int) -> int:
        """Number of parameters of one grown block."""
        return sum(parameter.numel() for parameter in self.blocks[str(slot)].parameters())


def _tensors(block: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, those that ``state_dict`` leaves out too."""
    return {name: value.detach() for name, value in (*block.named_parameters(), *block.named_buffers())}


def _bare(site: nn.Module) -> nn.Module:
    """The site's module without anything attached to it, so that a copy carries neither seeds nor hooks."""
    attached = [(module, module._modules.pop("seed_layer")) for module in list(site.modules()) if "seed_layer" in module._modules]
    hooks = [(module, dict(module._forward_hooks)) for module in site.modules() if module._forward_hooks]
    for module, _ in hooks:
        module._forward_hooks.clear()
    try:
        return copy.deepcopy(site)
    finally:
        for module, layer in attached:
            module._modules["seed_layer"] = layer
        for module, saved in hooks:
            module._forward_hooks.update(saved)
