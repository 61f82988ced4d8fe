"""Settings of the example hosts (config group ``model``); torch is imported when a host is built."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from esper.setting_fields import setting

if TYPE_CHECKING:
    import torch

    from esper.hosts.cnn import CNN
    from esper.hosts.mlp import MLP
    from esper.hosts.transformer import Transformer
    from esper.tasks.base import Task

ACTIVATIONS = ("relu", "gelu", "tanh")


@dataclass
class MLPConfig:
    """A multilayer perceptron, by default so small that growing has something to win; 64 features make a grown-up host for digits."""

    name: str = "mlp"
    width: int = setting(6, low=1, high=65536, unit="features", help="features of every hidden layer")
    depth: int = setting(2, low=1, high=64, unit="layers", help="hidden layers")
    activation: str = setting("relu", choices=ACTIVATIONS, help="after every hidden layer")
    weights: str = setting("", help="start from these weights: a run's folder or a .safetensors file")

    def build(self, task: Task, generator: torch.Generator) -> MLP:
        """The host for ``task``, every parameter drawn from ``generator``; raises UserError where the two do not fit."""
        from esper.hosts import mlp

        return mlp.build(self, task, generator)


@dataclass
class CNNConfig:
    """A residual convolution net, 1-D or 2-D as the task's inputs are; its sites are its convolutions."""

    name: str = "cnn"
    channels: list[int] = setting([8, 16], unit="channels", help="width of each stage; a new width halves space")
    blocks: int = setting(1, low=1, high=32, unit="blocks", help="residual blocks in every stage")
    kernel: int = setting(3, low=1, high=31, help="size of every convolution; odd")
    stride: int = setting(2, low=1, high=4, help="of the stem")
    norm: str = setting("group", choices=("group", "batch"), help="batch norm is recalibrated as seeds switch")
    groups: int = setting(4, low=1, help="of a group norm; must divide every width")
    weights: str = setting("", help="start from these weights: a run's folder or a .safetensors file")

    def build(self, task: Task, generator: torch.Generator) -> CNN:
        """The host for ``task``, every parameter drawn from ``generator``; raises UserError where the two do not fit."""
        from esper.hosts import cnn

        return cnn.build(self, task, generator)


@dataclass
class TransformerConfig:
    """A character decoder for task=text, whose context it takes; its sites are the hidden layers of its perceptrons."""

    name: str = "transformer"
    width: int = setting(64, low=2, high=16384, unit="features", help="of the residual stream")
    depth: int = setting(2, low=1, high=128, unit="blocks", help="decoder blocks")
    heads: int = setting(4, low=1, high=256, help="attention heads; must divide the width")
    expansion: int = setting(4, low=1, high=16, help="the perceptrons' hidden width over the stream's")
    dropout: float = setting(0.0, low=0.0, high=0.9, help="of attention weights, branches and embeddings")
    tied: bool = setting(False, help="the head is the character embedding")
    weights: str = setting("", help="start from these weights: a run's folder or a .safetensors file")

    def build(self, task: Task, generator: torch.Generator) -> Transformer:
        """The host for ``task``, every parameter drawn from ``generator``; raises UserError where the two do not fit."""
        from esper.hosts import transformer

        return transformer.build(self, task, generator)


CONFIGS: dict[str, type] = {"mlp": MLPConfig, "cnn": CNNConfig, "transformer": TransformerConfig}
