"""A decoder over characters: norms first, causal attention, a GELU perceptron in every block."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from esper.errors import UserError
from esper.fields import setting
from esper.hosts.base import ResidualBlock, block_names, initialise, require, untouched_global_rng
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
        n, length, width = x.shape
        query, key, value = self.qkv(x).view(n, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True)
        return self.output(mixed.transpose(1, 2).reshape(n, length, width))


class Perceptron(nn.Module):
    """``fc2(gelu(fc1(x)))`` with a hidden layer ``expansion`` times as wide."""

    def __init__(self, width: int, expansion: int) -> None:
        super().__init__()
        self.fc1, self.act1 = nn.Linear(width, expansion * width), nn.GELU()
        self.fc2 = nn.Linear(expansion * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, T, width]`` to the same."""
        return self.fc2(self.act1(self.fc1(x)))


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
        return x + self.drop2(self.mlp(self.norm2(x)))


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
        return self.head(self.norm(hidden))


@dataclass
class TransformerConfig:
    """A character decoder; its context is the task's (``task.context``), its positions are learnt."""

    name: str = "transformer"
    width: int = setting(64, low=2, high=16384, unit="features", help="of the residual stream")
    depth: int = setting(2, low=1, high=128, unit="blocks", help="decoder blocks")
    heads: int = setting(4, low=1, high=256, help="attention heads; must divide the width")
    expansion: int = setting(4, low=1, high=16, help="the perceptrons' hidden width over the stream's")
    dropout: float = setting(0.0, low=0.0, high=0.9, help="of attention weights, branches and embeddings")
    tied: bool = setting(False, help="the head is the character embedding")
    weights: str = setting("", help="start from these weights: a run's folder or a .safetensors file")

    def build(self, task: Task, generator: torch.Generator) -> Transformer:
        """The host for ``task``, every parameter drawn from ``generator``.

        Layers that write to the residual stream are scaled by 1/√(2·depth), as in GPT-2 (Radford et al. 2019).

        Raises:
            UserError: a task without characters, heads that do not divide the width.
        """
        require(task.inputs == "tokens", self.name, task, "characters", "use model=mlp or model=cnn")
        if self.width % self.heads:
            raise UserError(f"model.heads={self.heads} does not divide model.width={self.width}; choose a divisor.")
        with untouched_global_rng():
            blocks = [DecoderBlock(self.width, self.heads, self.expansion, self.dropout) for _ in range(self.depth)]
            host = Transformer(task.outputs, task.input_shape[0], self.width, self.dropout, blocks)
        initialise(host, generator)
        with torch.no_grad():
            for block in blocks:
                for name in block.output_layers:
                    block.get_submodule(name).weight.div_(math.sqrt(2 * self.depth))
        if self.tied:
            host.head.weight = host.characters.weight
        return host
