"""``SeedLayer``: all the seeds of one site as one module, called on the site's output."""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from esper.blueprints import BlockBank, SlotBank
from esper.blueprints.block_call import BlockCall, map_first_tensor
from esper.errors import UserError
from esper.kernels import Kernels
from esper.seeds.blend import blend
from esper.seeds.branch_groups import BranchGroups
from esper.seeds.graph_ops import forward_in_graph
from esper.seeds.hidden_layers import Source
from esper.seeds.recording import Recording
from esper.seeds.sites import Site

ATTRIBUTE = "seed_layer"
"""Name under which the layer hangs on its site's module."""


class ModelHook:
    """Base of other objects with a hook of their own on the model, so that an export leaves them out."""


class OpaqueToCompiler:
    """Base of objects that ``torch.compile`` must not trace, since every change in them would compile the host anew.

    A compiled host knows only ``asleep``: asleep, the object is not in the graph.
    """

    asleep = False


class SeedLayer(nn.Module, OpaqueToCompiler):
    """Returns its input itself while nothing is blended; otherwise ``x + Σ α·δ(x)`` with the branches of the present ``groups``.

    ``recording`` is set for forwards whose activations and gradients will be read. ``forces_grad`` makes the output require a gradient
    where nothing before it does, so that the loss of a wholly frozen host can be sent backward.

    The graph of a compiled host contains ``esper.seeds.graph_ops`` instead. It depends on four flags of the layer: ``asleep``;
    ``telemetry_due``; ``leaves_graph``, where a blended branch cannot be in the graph; and ``keeps_activation``, where an objective needs
    the activations. The last two break the graph at this site. ``ran_eagerly`` tells who resets it of a forward outside a graph.
    """

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.name = site.name
        self.geometry = site.geometry
        self.banks = nn.ModuleDict()
        self.groups: BranchGroups = []
        self.recording: Recording | None = None
        self.forces_grad = False
        self.kernels: Kernels | None = None
        self.telemetry_due = False
        self.keeps_activation = False
        self.leaves_graph = False
        self.graph_number = -1
        self.ran_eagerly = False
        self.source: Source | None = None

    def listen(self, module: nn.Module) -> None:
        """Hear what ``module`` reads, for branches that read the same."""
        self.source = Source(module)

    def forward(self, x: Tensor) -> Tensor:
        """``[…, width]`` (or channels first) → the same shape and dtype."""
        recording = self.recording
        if (self.groups or recording is not None) and not self._fits(x):
            self._refuse(x)
        if recording is not None:
            recording.read(x, self.name, self.kernels)
        y = blend(x, self.groups, self.geometry, recording) if self.groups else x
        if recording is not None and torch.is_grad_enabled():
            if recording.keep_activation and not y.requires_grad:
                # Data entering the host: an objective wants the gradient there all the same. A copy, because the host may
                # go on in place, which autograd forbids on a leaf.
                y = y.detach().requires_grad_().clone()
            if y.requires_grad:
                y = y.clone() if y._is_view() else y  # autograd drops the hooks of a view on which the host goes on in place
                y.register_hook(recording.keep_gradient)
        if self.forces_grad and torch.is_grad_enabled() and not y.requires_grad:
            y = y.detach().requires_grad_().clone()  # a clone, since the host may go on in place
        return y

    def _fits(self, x: Tensor) -> bool:
        return x.dim() > max(self.geometry.dim, 0) and x.shape[self.geometry.dim] == self.geometry.width

    def _refuse(self, x: Tensor) -> None:
        width, dim = self.geometry.width, self.geometry.dim
        where = "last axis" if dim < 0 else f"axis {dim}"
        raise UserError(
            f"The site '{self.name}' gave {list(x.shape)}, but its seeds were attached where its {where} had {width} features, and keep "
            "to these; attach to a module whose width stays the same."
        )

    def bank(self, blueprint: str) -> SlotBank | BlockBank:
        """The bank of one blueprint's branches here."""
        bank = self.banks[blueprint]
        assert isinstance(bank, (SlotBank, BlockBank))
        return bank

    def attach(self, module: nn.Module) -> None:
        """Hang on a module: as its child, so that ``to``, ``state_dict`` and DDP see it, and as its forward hook."""
        module.add_module(ATTRIBUTE, self)
        module.register_forward_hook(self._on_output, with_kwargs=True)
        mark_for_compiler(module)

    def _on_output(self, module: nn.Module, inputs: Any, named: Any, output: Any) -> Any:
        if not torch.compiler.is_compiling():
            return self.grown(inputs, named, output)
        if self.leaves_graph or self.keeps_activation:
            return _outside_the_graph(self, inputs, named, output)
        if self.asleep and not self.telemetry_due and not self.forces_grad:
            return None
        return map_first_tensor(output, lambda x: self._in_graph(x, inputs, named))

    def _in_graph(self, x: Tensor, inputs: Any, named: Any) -> Tensor:
        if not self._fits(x):
            _refuse_outside(self, x)
        return forward_in_graph(x, self.graph_number, not self.asleep, self.telemetry_due, self.forces_grad, inputs, named)

    def grown(self, inputs: tuple[Any, ...], named: dict[str, Any], output: Any) -> Any:
        """The module's output with the branches on its first tensor."""
        self.ran_eagerly = True
        blocks = [bank for bank in self.banks.values() if isinstance(bank, BlockBank)] if self.banks else []
        for bank in blocks:
            bank.call = BlockCall.of(inputs, named)
        result = map_first_tensor(output, self)
        if self.source is not None:
            self.source.forget()
        for bank in blocks:
            bank.call = bank.call.detached()  # an objective may still ask for the block's answer
        return result


def mark_for_compiler(module: nn.Module) -> None:
    """Let a compiler tell a module with seeds from one of the same class without.

    Graphs belong to code, not to a model, and are not compiled again for a hook. A second model of the class, compiled without seeds, would
    lend its graph to this one, and its seeds would have no effect. A ``forward`` of the module's own prevents this.
    """
    module.__dict__.setdefault("forward", MethodType(type(module).forward, module))


def unmark_for_compiler(module: nn.Module) -> None:
    """Undo ``mark_for_compiler``."""
    own = module.__dict__.get("forward")
    if isinstance(own, MethodType) and own.__func__ is type(module).forward:
        del module.__dict__["forward"]


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _outside_the_graph(layer: SeedLayer, inputs: tuple[Any, ...], named: dict[str, Any], output: Any) -> Any:
    return layer.grown(inputs, named, output)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _refuse_outside(layer: SeedLayer, x: Tensor) -> None:
    layer._refuse(x)


def device_of(module: nn.Module) -> torch.device:
    """Where a module's first parameter or buffer lives; the CPU where it has none."""
    for tensor in (*module.parameters(), *module.buffers()):
        return tensor.device
    return torch.device("cpu")
