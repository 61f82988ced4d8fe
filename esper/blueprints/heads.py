"""``heads``: attention heads for the host itself, ``δ = A'(x)`` on the output of an attention layer, ``x`` being what that layer reads.

``A'`` is the host's own layer with other, fewer heads. The heads of a layer are summed by its output, so that at α = 1 the network is the
host with more heads, and is exported as one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from esper.blueprints.block import Block, bare
from esper.blueprints.config import HeadsSettings
from esper.blueprints.geometry import Geometry


@dataclass
class Heads(HeadsSettings, Block):
    """New heads, of the present ones' size; their output starts at zero."""

    reads_input = True
    part_of_layer = True

    def misfit(self, geometry: Geometry) -> str | None:
        """Whether the module is an attention layer is seen by ``silencing_misfit``."""
        return None

    def silencing_misfit(self, block: nn.Module) -> str | None:
        """Why no heads can be added to a module, or None."""
        if is_attention(block):
            return None
        return (
            f"heads needs an attention layer with linear layers qkv and output and a number of heads, and {type(block).__name__} is none; "
            "sites.match=auto finds those of esper's own transformer"
        )

    def build(self, sources: Sequence[nn.Module], generator: torch.Generator) -> nn.Module:
        """A layer of new heads alone, like the site's: queries, keys and values in ±1/√fan_in, the output zero."""
        block = self.blank(sources)
        drawn = block.get_submodule("qkv")
        with torch.no_grad():
            bound = 1.0 / math.sqrt(drawn.get_parameter("weight").shape[1])
            for parameter in drawn.parameters():
                parameter.copy_(torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator))
        return block

    def blank(self, sources: Sequence[nn.Module]) -> nn.Module:
        """The same with all weights zero."""
        host: Any = bare(sources[-1])
        size = host.output.in_features // host.heads * self.heads
        bias = host.qkv.bias is not None
        host.qkv = _zeros(host.qkv, host.qkv.in_features, 3 * size, bias)
        host.output = _zeros(host.output, size, host.output.out_features, False)  # the host's bias is enough
        host.heads = self.heads
        module: nn.Module = host
        return module


def _zeros(like: nn.Linear, inputs: int, outputs: int, bias: bool) -> nn.Linear:
    made = nn.utils.skip_init(nn.Linear, inputs, outputs, bias=bias, device=like.weight.device, dtype=like.weight.dtype)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.zero_()
    layer: nn.Linear = made
    return layer


def is_attention(module: nn.Module) -> bool:
    """Whether a module holds ``qkv`` (queries, keys and values of all heads, in this order), ``output`` and the number of its ``heads``."""
    qkv, output, heads = (getattr(module, name, None) for name in ("qkv", "output", "heads"))
    if type(qkv) is not nn.Linear or type(output) is not nn.Linear or not isinstance(heads, int):
        return False
    return qkv.out_features == 3 * output.in_features and output.in_features % heads == 0


@torch.no_grad()
def add_heads(attention: Any, heads: int, more: Any = None, alpha: float = 1.0) -> None:
    """Give an attention layer ``heads`` more, in place: those of the layer ``more``, with ``alpha`` on their output (None: zeros)."""
    qkv, output = attention.qkv, attention.output
    size = output.in_features // attention.heads * heads
    more_qkv = qkv.weight.new_zeros(3 * size, qkv.in_features) if more is None else more.qkv.weight
    qkv.weight = nn.Parameter(_beside(qkv.weight, more_qkv))
    if qkv.bias is not None:
        qkv.bias = nn.Parameter(_beside(qkv.bias, qkv.bias.new_zeros(3 * size) if more is None else more.qkv.bias))
    columns = output.weight.new_zeros(output.out_features, size) if more is None else alpha * more.output.weight
    output.weight = nn.Parameter(torch.cat([output.weight, columns], 1))
    qkv.out_features, output.in_features, attention.heads = qkv.out_features + 3 * size, output.in_features + size, attention.heads + heads


def _beside(present: Tensor, more: Tensor) -> Tensor:
    """Rows of queries, keys and values, the new ones behind the present ones of each kind."""
    parts = [torch.cat(pair) for pair in zip(present.chunk(3), more.chunk(3), strict=True)]
    return torch.cat(parts)
