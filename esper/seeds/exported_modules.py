"""The modules of an exported model where branches grew: small, on plain torch, without the engine.

They are functions of tensors alone, so ``torch.export`` and ONNX take them as they take any other module.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from esper.blueprints.block_call import PLAIN_CALL, BlockCall, map_first_tensor
from esper.blueprints.plain_modules import linear


def called(module: nn.Module, inputs: Any) -> None:
    """A forward pre-hook that does nothing, but says that ``module`` must be called.

    ``nn.TransformerEncoderLayer`` reads the weights of its layers instead of calling them where nothing is learnt, unless one of
    them has a hook; so do its relatives. A branch on a layer is in its call, and not in its weights.
    """


class GrownBranch(nn.Module):
    """The addition of one branch to the features ``[start, end)`` along ``dim``; α is inside ``net``, or in ``scale``.

    ``residual`` is the α of a branch ``δ = b − id`` (grown by reconstruction), 0 for all others.
    """

    def __init__(self, net: nn.Module, start: int, end: int, dim: int, chunk: bool, scale: float = 1.0, residual: float = 0.0) -> None:
        super().__init__()
        self.net = net
        self.start, self.end, self.dim = start, end, dim
        self.chunk, self.scale, self.residual = chunk, scale, residual

    def forward(self, x: Tensor) -> Tensor:
        """The whole site's activation → the addition to the chunk, shaped as the chunk."""
        chunk = x.narrow(self.dim, self.start, self.end - self.start) if self.chunk or self.residual else x
        added = self.net(chunk if self.chunk else x)
        if self.scale != 1.0:
            added = self.scale * added
        total: Tensor = added - self.residual * chunk if self.residual else added
        return total


class GrownBlock(nn.Module):
    """The addition of a grown residual block to the whole site: ``α·(B(x) − x)``."""

    def __init__(self, block: nn.Module, width: int, dim: int, alpha: float) -> None:
        super().__init__()
        self.block = block
        self.start, self.end, self.dim = 0, width, dim
        self.alpha = alpha

    def forward(self, x: Tensor, call: BlockCall = PLAIN_CALL) -> Tensor:
        """``[…]`` → the same shape; ``call`` is how the host called its own block."""
        return self.alpha * (call.answer(self.block, x) - x)


class SharedHidden(nn.Module):
    """Perceptrons that read the same features, as one wide hidden layer with an output layer each: fewer, larger products."""

    def __init__(self, nets: list[nn.Sequential]) -> None:
        super().__init__()
        weights, biases = ([net[0].get_parameter(name).detach() for net in nets] for name in ("weight", "bias"))
        spatial = weights[0].dim() - 2
        weight, bias = torch.cat([one.flatten(1) for one in weights]), torch.cat(biases)
        self.first, self.act = linear(weight.t(), bias, spatial), nets[0][1]
        self.lasts = nn.ModuleList(net[2] for net in nets)
        self.sizes = [len(one) for one in biases]
        self.dim = -1 - spatial

    def forward(self, x: Tensor) -> list[Tensor]:
        """The output of each perceptron, in their order."""
        parts = self.act(self.first(x)).split(self.sizes, self.dim)
        return [last(part) for last, part in zip(self.lasts, parts, strict=True)]


class GrownSite(nn.Module):
    """A module of the host with the branches on its output: ``y = x + Σ α·δ(x)``, every branch on its own features."""

    def __init__(self, module: nn.Module, branches: list[GrownBranch | GrownBlock], width: int, dim: int) -> None:
        super().__init__()
        self.register_forward_pre_hook(called)
        self.module = module
        self.dim = dim
        self.bounds = [(branch.start, branch.end) for branch in branches]
        self.shared = all(_is_perceptron(branch) for branch in branches) and len(branches) > 1 and _same_activation(branches)
        self.branches: nn.Module
        if self.shared:
            self.branches = SharedHidden([branch.net for branch in branches])  # type: ignore[misc]  # _is_perceptron has looked
        else:
            self.branches = nn.ModuleList([_module_of(branch) for branch in branches])
        self.blocks = any(isinstance(branch, GrownBlock) for branch in branches)
        self.spans = _spans(self.bounds, width)
        self.whole = all(bounds == (0, width) for bounds in self.bounds)
        self.tiled = [span[2] for span in self.spans] == [[number] for number in range(len(branches))]

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """As the host's module, plus its branches (on the first of its outputs, where it gives several)."""
        output = self.module(*inputs, **named)
        if self.blocks:
            call = BlockCall.of(inputs, named)
            return map_first_tensor(output, lambda x: self._grown(x, call))
        return self._grown(output) if isinstance(output, Tensor) else map_first_tensor(output, self._grown)

    def __getattr__(self, name: str) -> Any:
        return _of_module(self, name)

    def _grown(self, x: Tensor, call: BlockCall = PLAIN_CALL) -> Tensor:
        if self.shared:
            added = self.branches(x)
        else:
            branches = list(self.branches)  # type: ignore[call-overload]
            added = [branch(x, call) if isinstance(branch, GrownBlock) else branch(x) for branch in branches]
        if added[0].dtype != x.dtype:
            added = [part.to(x.dtype) for part in added]
        if self.tiled:  # the branches fill the site, one beside the other
            return x + (torch.cat(added, self.dim) if len(added) > 1 else added[0])
        if self.whole:
            return x + torch.stack(added).sum(0)
        return torch.cat([self._span(x, added, *span) for span in self.spans], self.dim)

    def _span(self, x: Tensor, added: list[Tensor], start: int, end: int, numbers: list[int]) -> Tensor:
        part = x.narrow(self.dim, start, end - start)
        for number in numbers:
            first, last = self.bounds[number]
            mine = added[number]
            part = part + (mine if (first, last) == (start, end) else mine.narrow(self.dim, start - first, end - start))
        return part


class Deepened(nn.Module):
    """A residual block of the host followed by the block that grew after it (α = 1)."""

    def __init__(self, module: nn.Module, block: nn.Module) -> None:
        super().__init__()
        self.register_forward_pre_hook(called)
        self.module = module
        self.block = block

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """``B(module(x))``, on the first of the module's outputs, where it gives several; ``B`` is called as the module was."""
        output = self.module(*inputs, **named)
        call = BlockCall.of(inputs, named)
        return map_first_tensor(output, lambda x: call.answer(self.block, x))

    def __getattr__(self, name: str) -> Any:
        return _of_module(self, name)


class Adapted(nn.Module):
    """A linear layer of the host with ranks beside it, where they could not be put into its weight: ``module(x) + (x·down)·up``."""

    def __init__(self, module: nn.Module, down: Tensor, up: Tensor) -> None:
        super().__init__()
        self.register_forward_pre_hook(called)
        self.module = module
        self.down, self.up = linear(down, None, 0), linear(up, None, 0)

    def forward(self, x: Tensor) -> Tensor:
        """``[…, Cin]`` → ``[…, C]``."""
        output: Tensor = self.module(x)
        added: Tensor = self.up(self.down(x))
        return output + added.to(output.dtype)

    def __getattr__(self, name: str) -> Any:
        return _of_module(self, name)


def _of_module(grown: nn.Module, name: str) -> Any:
    """An attribute of ``grown``, or of the host's module that it took the place of: hosts ask their layers for their kind."""
    try:
        return nn.Module.__getattr__(grown, name)
    except AttributeError:
        if name in ("module", "_modules"):
            raise
        return getattr(nn.Module.__getattr__(grown, "module"), name)


def _is_bare(branch: GrownBranch | GrownBlock) -> bool:
    """Whether the branch's addition is the output of its net for the whole site."""
    return isinstance(branch, GrownBranch) and not branch.chunk and branch.scale == 1.0 and not branch.residual


def _module_of(branch: GrownBranch | GrownBlock) -> nn.Module:
    """The net alone, where nothing is to be done around it."""
    return branch.net if isinstance(branch, GrownBranch) and _is_bare(branch) else branch


def _is_perceptron(branch: GrownBranch | GrownBlock) -> bool:
    if not _is_bare(branch):
        return False
    net = branch.net
    kinds = [type(layer) for layer in net] if isinstance(net, nn.Sequential) else []
    layers = (nn.Linear, nn.Conv1d, nn.Conv2d)
    return len(kinds) == 3 and kinds[0] in layers and kinds[2] in layers and kinds[1] not in layers and kinds[0] is kinds[2]


def _same_activation(branches: list[GrownBranch | GrownBlock]) -> bool:
    return len({type(branch.net[1]) for branch in branches}) == 1  # type: ignore[index]  # _is_perceptron has looked


def _spans(owned: list[tuple[int, int]], width: int) -> list[tuple[int, int, list[int]]]:
    """The features cut wherever a branch begins or ends: ``(start, end, numbers of the branches that write there)``."""
    cuts = sorted({0, width, *(edge for bounds in owned for edge in bounds)})
    return [
        (start, end, [number for number, (first, last) in enumerate(owned) if first <= start and end <= last])
        for start, end in pairwise(cuts)
    ]
