"""``block``: whole residual blocks (depth growth) behind a residual block of the host: δ(y) = B(y) − y.

``B`` is one block or several, which start as copies of the host's block, as copies whose output is silenced, fresh with a silenced
output, or fresh. Under the α ramp all of them change nothing at first. Growing by copies is the depth growth of Gong et al. 2019 and
G_stack (Du et al. 2024): with ``source=stack`` at the last block the host's stack is put on top of itself, with ``source=site`` at every
block the copies are interleaved. With ``start=shared`` the host's own weights serve a second time (Dehghani et al. 2019), until the
branch is *untied*: from then on it has a copy of its own.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from esper.blueprints.block_call import PLAIN_CALL, Chain
from esper.blueprints.config import BlockSettings
from esper.blueprints.geometry import Geometry
from esper.errors import UserError


@dataclass
class Block(BlockSettings):
    """Depth growth; ``output_layers`` names the layers whose zeroing makes a block the identity (else the host says)."""

    reads_input = False
    """Whether what grew reads the site's input and is added to its output; else it reads the output, and takes its place."""
    part_of_layer = False
    """Whether what grew becomes part of the host's own layers in an exported model; where such branches grow, no others do."""

    def misfit(self, geometry: Geometry) -> str | None:
        """Only modules that map their input to its own shape."""
        return None if geometry.residual else "block needs a residual block (a module whose output has its input's shape)"

    def silencing_misfit(self, block: nn.Module) -> str | None:
        """Why the block's output cannot be put at zero as ``start`` asks, or None."""
        if self.start not in ("zero_copy", "fresh"):
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

    def build(self, sources: Sequence[nn.Module], generator: torch.Generator) -> nn.Module:
        """New blocks, on the device of the host's ``sources``: copies are made of these in turn."""
        return assembled([self._one(source, generator) for source in self.originals(sources)])

    def originals(self, sources: Sequence[nn.Module]) -> list[nn.Module]:
        """Which of the host's blocks each block of a branch is a copy of."""
        chosen = list(sources) if self.source == "stack" else [sources[-1]]
        return [chosen[number % len(chosen)] for number in range(self.blocks)]

    def blank(self, sources: Sequence[nn.Module]) -> nn.Module:
        """A module of the right shapes, whose values are to be replaced."""
        return assembled([bare(source) for source in self.originals(sources)])

    def _one(self, source: nn.Module, generator: torch.Generator) -> nn.Module:
        block = bare(source)
        for parameter in block.parameters():
            parameter.requires_grad_(True)
            parameter.grad = None
        if self.start in ("fresh", "random"):
            _redraw(block, generator)
        if self.start in ("zero_copy", "fresh"):
            self.silence(block)
        return block


def assembled(blocks: list[nn.Module]) -> nn.Module:
    """One module for all of a branch's blocks."""
    return blocks[0] if len(blocks) == 1 else Chain(blocks)


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
    """What grew from one blueprint at one site; a slot is a module of its own, with its optimizer moments beside it.

    ``sources`` are the host's blocks, the site's last. A slot that is ``tied`` has its module for the names and buffers alone: its
    parameters are the host's, which learn by the host's optimizer from both of their places.
    """

    def __init__(self, blueprint: Block, sources: Sequence[nn.Module], device: torch.device) -> None:
        super().__init__()
        self.blueprint = blueprint
        self.blocks = nn.ModuleDict()
        self.moments: dict[str, dict[str, tuple[Tensor, Tensor]]] = {}
        self.steps: dict[str, int] = {}
        self.tied: set[str] = set()
        self.call = PLAIN_CALL
        self.source: Any = None
        """What hears the site's input, where that is read (``esper.seeds.hidden_layers``)."""
        self._sources = tuple(sources)  # a tuple, so that the host's blocks are no children of their own growth
        self._next = 0

    def allocate(self, seed: int, generator: torch.Generator, silent: bool) -> int:
        """Build a block; returns its slot (slots are never reused). ``silent`` is the blueprint's own choice of start."""
        slot, self._next = self._next, self._next + 1
        key = str(slot)
        self.blocks[key] = self.blueprint.build(self._sources, generator)
        if self.blueprint.start == "shared":
            self.tied.add(key)
        zeros = {name: torch.zeros_like(value) for name, value in self.blocks[key].named_parameters()}
        self.moments[key] = {name: (zero, zero.clone()) for name, zero in zeros.items()}
        self.steps[key] = 0
        return slot

    def free(self, slot: int) -> None:
        """Drop the block and its moments."""
        key = str(slot)
        del self.blocks[key], self.moments[key], self.steps[key]
        self.tied.discard(key)

    def originals(self, slot: int) -> dict[str, nn.Parameter]:
        """The host's parameter that each parameter of a slot is, or began as, a copy of; by the slot's names."""
        sources, several = self.blueprint.originals(self._sources), isinstance(self.blocks[str(slot)], Chain)
        found: dict[str, nn.Parameter] = {}
        for name, _ in self.blocks[str(slot)].named_parameters():
            number, _, inner = name.partition(".") if several else ("0", "", name)
            found[name] = sources[int(number)].get_parameter(inner)
        return found

    @torch.no_grad()
    def untie(self, slot: int) -> None:
        """From now on a tied slot has a copy of its own of the parameters that it shared."""
        shared = self.originals(slot)
        for name, parameter in self.blocks[str(slot)].named_parameters():
            parameter.copy_(shared[name])
        self.tied.remove(str(slot))

    def state(self) -> dict[str, Any]:
        """All blocks, parameters and buffers, with their moments and steps, by reference."""
        return {
            "next": self._next,
            "blocks": {key: _tensors(block) for key, block in self.blocks.items()},
            "moments": {key: {name: list(pair) for name, pair in held.items()} for key, held in self.moments.items()},
            "steps": dict(self.steps),
            "tied": sorted(self.tied),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Take over a saved state. Raises ValueError where its tensors are not those of the site's block."""
        self.blocks, self.moments, self.steps = nn.ModuleDict(), {}, {}
        self._next, self.tied = int(state["next"]), set(state.get("tied", []))
        for key, saved in state["blocks"].items():
            block = self.blueprint.blank(self._sources)
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
        """``B(y) − y``, called as the host last called its own; without ``learning`` no gradient flows to the block's parameters.

        Where the blueprint ``reads_input``, ``B(x)`` of what the site read.

        To parameters of the host's it always does: they learn whatever stage the branch is in.
        """
        block, parameters = self.blocks[str(slot)], None
        if str(slot) in self.tied:
            parameters = dict[str, Tensor](self.originals(slot))
        elif not learning:
            parameters = {name: value.detach() for name, value in block.named_parameters()}
        if self.blueprint.reads_input:
            return self.call.answer(block, self.source.activation, parameters)
        return self.call.answer(block, y, parameters) - y

    def scale_gradient(self, slot: int, factor: float) -> None:
        """Multiply one block's gradients (undoing a loss scale)."""
        for parameter in self.blocks[str(slot)].parameters():
            if parameter.grad is not None:
                parameter.grad *= factor

    def learning_parameters(self, slot: int) -> list[nn.Parameter]:
        """The parameters of a slot's own: none while it is tied."""
        return [] if str(slot) in self.tied else list(self.blocks[str(slot)].parameters())

    def parameters_of(self, slot: int) -> int:
        """Number of parameters that a slot adds to the host's."""
        return sum(parameter.numel() for parameter in self.learning_parameters(slot))

    def plain(self, slot: int) -> nn.Module:
        """A copy of a slot's module that stands alone, with the values that it has at present."""
        block = copy.deepcopy(self.blocks[str(slot)])
        with torch.no_grad():
            for name, value in self.originals(slot).items() if str(slot) in self.tied else ():
                block.get_parameter(name).copy_(value)
        return block


def _tensors(block: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, those that ``state_dict`` leaves out too."""
    return {name: value.detach() for name, value in (*block.named_parameters(), *block.named_buffers())}


def bare(site: nn.Module) -> nn.Module:
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
