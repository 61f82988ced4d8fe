"""A decoder over characters: norms first, causal attention, a GELU perceptron in every block."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from esper.errors import UserError
from esper.hosts.base import ResidualBlock, block_names, initialise, require, untouched_global_rng
from esper.hosts.config import TransformerConfig
from esper.tasks.base import Task


class Attention(nn.Module):
    """Causal self-attention (Vaswani et al. 2017), through torch's fused kernel."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, T, width]`` to the same; position t sees positions up to t."""
        n, length = x.shape[:2]
        query, key, value = self.qkv(x).view(n, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True)
        mapped: Tensor = self.output(mixed.transpose(1, 2).flatten(2))
        return mapped


class Perceptron(nn.Module):
    """``fc2(gelu(fc1(x)))`` with a hidden layer ``expansion`` times as wide."""

    def __init__(self, width: int, expansion: int) -> None:
        super().__init__()
        self.fc1, self.act1 = nn.Linear(width, expansion * width), nn.GELU()
        self.fc2 = nn.Linear(expansion * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, T, width]`` to the same."""
        mapped: Tensor = self.fc2(self.act1(self.fc1(x)))
        return mapped


class DecoderBlock(ResidualBlock):
    """``x + attention(norm1(x))``, then ``x + mlp(norm2(x))``."""

    output_layers = ("attention.output", "mlp.fc2")

    def __init__(self, width: int, heads: int, expansion: int, dropout: float) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads, dropout)
        self.norm2, self.mlp = nn.LayerNorm(width), Perceptron(width, expansion)
        self.drop1, self.drop2 = nn.Dropout(dropout), nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, T, width]`` to the same."""
        x = x + self.drop1(self.attention(self.norm1(x)))
        added: Tensor = self.drop2(self.mlp(self.norm2(x)))
        return x + added


class Transformer(nn.Module):
    """Embeddings of characters and positions, ``blocks``, a last norm, and a ``head`` over the vocabulary."""

    growth_sites = ("blocks.*.mlp.fc1",)
    """The hidden layers of the perceptrons, before their activations."""

    def __init__(self, vocabulary: int, context: int, width: int, dropout: float, blocks: list[DecoderBlock]) -> None:
        super().__init__()
        self.characters = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(context, width)
        self.drop = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.growth_blocks = block_names(self)

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits ``[N, T, vocabulary]`` of characters ``[N, T]`` (int64), T at most the context."""
        places = torch.arange(inputs.shape[1], device=inputs.device)
        hidden = self.drop(self.characters(inputs) + self.positions(places))
        for block in self.blocks:
            hidden = block(hidden)
        logits: Tensor = self.head(self.norm(hidden))
        return logits


def build(config: TransformerConfig, task: Task, generator: torch.Generator) -> Transformer:
    """The host for ``task``, every parameter drawn from ``generator``.

    Layers that write to the residual stream are scaled by 1/√(2·depth), as in GPT-2 (Radford et al. 2019).

    Raises:
        UserError: a task without characters, heads that do not divide the width.
    """
    require(task.inputs == "tokens", config.name, task, "characters", "use model=mlp or model=cnn")
    if config.width % config.heads:
        raise UserError(f"model.heads={config.heads} does not divide model.width={config.width}; choose a divisor.")
    with untouched_global_rng():
        blocks = [DecoderBlock(config.width, config.heads, config.expansion, config.dropout) for _ in range(config.depth)]
        host = Transformer(task.outputs, task.input_shape[0], config.width, config.dropout, blocks)
    initialise(host, generator)
    with torch.no_grad():
        for block in blocks:
            for name in block.output_layers:
                block.get_submodule(name).get_parameter("weight").div_(math.sqrt(2 * config.depth))
    if config.tied:
        host.head.weight = host.characters.weight
    return host
