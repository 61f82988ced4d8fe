"""A residual convolution net, over series (1-D) or images (2-D) as the task's inputs are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from esper.errors import UserError
from esper.hosts.base import ResidualBlock, block_names, initialise, require, untouched_global_rng
from esper.hosts.config import CNNConfig
from esper.tasks.base import Task


@dataclass(frozen=True)
class _Parts:
    """Which convolution and which norm a net of ``space`` dimensions is made of."""

    space: int
    kernel: int
    norm: str
    groups: int

    def conv(self, inputs: int, outputs: int, stride: int = 1) -> nn.Module:
        make = nn.Conv1d if self.space == 1 else nn.Conv2d
        return make(inputs, outputs, self.kernel, stride=stride, padding=self.kernel // 2)

    def normalise(self, channels: int) -> nn.Module:
        if self.norm == "group":
            return nn.GroupNorm(self.groups, channels)
        return (nn.BatchNorm1d if self.space == 1 else nn.BatchNorm2d)(channels)


class ConvBlock(ResidualBlock):
    """``x + conv2(relu(norm2(conv1(relu(norm1(x))))))``: norms first (He et al. 2016, identity mappings)."""

    output_layers = ("conv2",)

    def __init__(self, channels: int, parts: _Parts) -> None:
        super().__init__()
        self.norm1, self.act1 = parts.normalise(channels), nn.ReLU()
        self.conv1 = parts.conv(channels, channels)
        self.norm2, self.act2 = parts.normalise(channels), nn.ReLU()
        self.conv2 = parts.conv(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, channels, *space]`` to the same shape."""
        hidden = self.conv1(self.act1(self.norm1(x)))
        added: Tensor = self.conv2(self.act2(self.norm2(hidden)))
        return x + added


class Stage(nn.Module):
    """Blocks of one width, after a strided convolution where the width changes."""

    def __init__(self, inputs: int, channels: int, blocks: int, parts: _Parts) -> None:
        super().__init__()
        self.down = parts.conv(inputs, channels, stride=2) if inputs != channels else nn.Identity()
        self.blocks = nn.ModuleList(ConvBlock(channels, parts) for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        """``[N, inputs, *space]`` to ``[N, channels, *space/2]`` (space is kept when the width is)."""
        x = self.down(x)
        for block in self.blocks:
            x = block(x)
        return x


class CNN(nn.Module):
    """``stem``, ``stages``, a last norm, the mean over space, a linear ``head``."""

    def __init__(self, inputs: int, classes: int, channels: list[int], blocks: int, stride: int, parts: _Parts) -> None:
        super().__init__()
        self.stem = parts.conv(inputs, channels[0], stride=stride)
        widths = [channels[0], *channels]
        self.stages = nn.ModuleList(Stage(before, width, blocks, parts) for before, width in zip(widths, channels, strict=False))
        self.norm, self.act = parts.normalise(channels[-1]), nn.ReLU()
        self.head = nn.Linear(channels[-1], classes)
        convolutions = [name for name, part in self.named_modules() if isinstance(part, (nn.Conv1d, nn.Conv2d))]
        self.growth_sites = tuple(convolutions)
        self.growth_blocks = block_names(self)

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits ``[N, classes]`` of inputs ``[N, channels, *space]``."""
        hidden = self.stem(inputs)
        for stage in self.stages:
            hidden = stage(hidden)
        logits: Tensor = self.head(self.act(self.norm(hidden)).flatten(2).mean(2))
        return logits


def build(config: CNNConfig, task: Task, generator: torch.Generator) -> CNN:
    """The host for ``task``, every parameter drawn from ``generator``.

    Raises:
        UserError: inputs that are neither series nor images, an even kernel, no stage, groups that do not divide.
    """
    space = len(task.input_shape) - 1
    fits = task.inputs == "real" and space in (1, 2)
    require(fits, config.name, task, "inputs shaped channels×length or channels×height×width", _instead(task))
    _refuse(config)
    parts = _Parts(space, config.kernel, config.norm, config.groups)
    with untouched_global_rng():
        host = CNN(task.input_shape[0], task.outputs, list(config.channels), config.blocks, config.stride, parts)
    initialise(host, generator)
    return host


def _refuse(config: CNNConfig) -> None:
    if not config.channels or min(config.channels) < 1:
        raise UserError(f"model.channels={list(config.channels)} must name a width for each stage, as in [8,16].")
    if config.kernel % 2 == 0:
        raise UserError(f"model.kernel={config.kernel} is even; an odd one keeps the shape that blocks need.")
    odd = [width for width in config.channels if width % config.groups]
    if config.norm == "group" and odd:
        raise UserError(
            f"model.groups={config.groups} does not divide the width {odd[0]} in model.channels; "
            "choose a divisor of every width, or norm=batch."
        )


def _instead(task: Task) -> str:
    return "use model=mlp" if task.inputs == "real" else "use model=transformer"
