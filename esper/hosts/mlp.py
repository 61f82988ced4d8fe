"""A multilayer perceptron over flattened inputs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from esper.hosts.base import ACTIVATIONS, initialise, require, untouched_global_rng
from esper.hosts.config import MLPConfig
from esper.tasks.base import Task


class MLP(nn.Module):
    """Flattened ``inputs``, ``depth`` hidden layers ``fc1, act1, fc2, act2, …`` and a linear ``head``.

    ``inputs`` is a module of its own so that seeds may sit there too: before the first narrow layer.
    """

    growth_sites = ("inputs", "fc*")
    """The flattened inputs, and the hidden layers' outputs before their activations."""

    def __init__(self, features: int, width: int, depth: int, classes: int, activation: str) -> None:
        super().__init__()
        self.inputs = nn.Flatten()
        for layer in range(1, depth + 1):
            self.add_module(f"fc{layer}", nn.Linear(features if layer == 1 else width, width))
            self.add_module(f"act{layer}", ACTIVATIONS[activation]())
        self.head = nn.Linear(width, classes)

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits ``[N, classes]`` of inputs ``[N, *shape]``."""
        hidden = inputs
        for layer in self.children():
            hidden = layer(hidden)
        return hidden


def build(config: MLPConfig, task: Task, generator: torch.Generator) -> MLP:
    """The host for ``task``, every parameter drawn from ``generator``.

    Raises:
        UserError: the task's inputs are tokens.
    """
    require(task.inputs == "real", config.name, task, "numbers as inputs", "use model=transformer")
    features = torch.Size(task.input_shape).numel()
    with untouched_global_rng():
        host = MLP(features, config.width, config.depth, task.outputs, config.activation)
    initialise(host, generator)
    return host
