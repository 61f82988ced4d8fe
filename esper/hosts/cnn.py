"""A residual convolution net, over series (1-D) or images (2-D) as the task's inputs are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from esper.errors import UserError
from esper.fields import setting
from esper.hosts.base import ResidualBlock, block_names, initialise, require, untouched_global_rng
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
        return x + self.conv2(self.act2(self.norm2(hidden)))


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
        return self.head(self.act(self.norm(hidden)).flatten(2).mean(2))


@dataclass
class CNNConfig:
    """A small residual net; ``growth_sites`` are its convolutions, ``growth_blocks`` its residual blocks."""

    name: str = "cnn"
    channels: list[int] = setting([8, 16], unit="channels", help="width of each stage; a new width halves space")
    blocks: int = setting(1, low=1, high=32, unit="blocks", help="residual blocks in every stage")
    kernel: int = setting(3, low=1, high=31, help="size of every convolution; odd")
    stride: int = setting(2, low=1, high=4, help="of the stem")
    norm: str = setting("group", choices=("group", "batch"), help="batch norm is recalibrated as seeds switch")
    groups: int = setting(4, low=1, help="of a group norm; must divide every width")
    weights: str = setting("", help="start from these weights: a run's folder or a .safetensors file")

    def build(self, task: Task, generator: torch.Generator) -> CNN:
        """The host for ``task``, every parameter drawn from ``generator``.

        Raises:
            UserError: inputs that are neither series nor images, an even kernel, no stage, groups that do not divide.
        """
        space = len(task.input_shape) - 1
        fits = task.inputs == "real" and space in (1, 2)
        require(fits, self.name, task, "inputs shaped channels×length or channels×height×width", _instead(task))
        self._refuse()
        parts = _Parts(space, self.kernel, self.norm, self.groups)
        with untouched_global_rng():
            host = CNN(task.input_shape[0], task.outputs, list(self.channels), self.blocks, self.stride, parts)
        initialise(host, generator)
        return host

    def _refuse(self) -> None:
        if not self.channels or min(self.channels) < 1:
            raise UserError(f"model.channels={list(self.channels)} must name a width for each stage, as in [8,16].")
        if self.kernel % 2 == 0:
            raise UserError(f"model.kernel={self.kernel} is even; an odd one keeps the shape that blocks need.")
        odd = [width for width in self.channels if width % self.groups]
        if self.norm == "group" and odd:
            raise UserError(
                f"model.groups={self.groups} does not divide the width {odd[0]} in model.channels; "
                "choose a divisor of every width, or norm=batch."
            )


def _instead(task: Task) -> str:
    return "use model=mlp" if task.inputs == "real" else "use model=transformer"
