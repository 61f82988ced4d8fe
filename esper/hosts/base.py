"""The common parts of example hosts: initialisation from one given generator, and residual blocks that can be copied."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn

from esper.errors import UserError

if TYPE_CHECKING:
    from esper.tasks.base import Task

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU, "tanh": nn.Tanh}


@contextmanager
def untouched_global_rng() -> Iterator[None]:
    """Torch's layers draw from the global generator while they are made; its state is put back."""
    with torch.random.fork_rng(devices=[]):
        yield


def initialise(module: nn.Module, generator: torch.Generator) -> None:
    """Draw every parameter from ``generator``, in the order of the modules; reset every buffer.

    Linear and convolution: uniform in ± 1/√fan_in, weight and bias (torch's own default); embeddings N(0, 0.02²);
    norms: weight 1, bias 0, running statistics reset.
    """
    for part in module.modules():
        if isinstance(part, (nn.Linear, nn.Conv1d, nn.Conv2d)):
            bound = 1 / math.sqrt(part.weight[0].numel())
            nn.init.uniform_(part.weight, -bound, bound, generator=generator)
            if part.bias is not None:
                nn.init.uniform_(part.bias, -bound, bound, generator=generator)
        elif isinstance(part, nn.Embedding):
            nn.init.normal_(part.weight, std=0.02, generator=generator)
        elif isinstance(part, (nn.LayerNorm, nn.GroupNorm, nn.BatchNorm1d, nn.BatchNorm2d)):
            part.reset_parameters()
        else:
            own = [name for name, _ in part.named_parameters(recurse=False)]
            assert not own, f"{type(part).__name__} has parameters {own} that no rule initialises"


class ResidualBlock(nn.Module):
    """A block ``y = x + f(x)`` of equal input and output shape, which depth growth may copy beside itself.

    Any module with this ``output_layers`` attribute is such a block: with those layers at zero it is the identity.
    """

    output_layers: tuple[str, ...]
    """Names, inside the block, of the last layers of everything it adds to ``x``."""

    def reset(self, generator: torch.Generator) -> None:
        """Start afresh: every parameter drawn from ``generator``."""
        initialise(self, generator)

    @torch.no_grad()
    def zero_output(self) -> None:
        """Make the block the identity by zeroing weight and bias of its ``output_layers``."""
        for name in self.output_layers:
            for parameter in self.get_submodule(name).parameters(recurse=False):
                parameter.zero_()


def require(fits: bool, host: str, task: Task, needs: str, instead: str) -> None:
    """Raise ``UserError`` when a host does not fit a task, naming its needs and a host that fits."""
    if not fits:
        shape = "×".join(map(str, task.input_shape))
        given = f"task={task.name} gives {'characters' if task.inputs == 'tokens' else 'numbers'} of shape {shape}"
        raise UserError(f"model={host} needs {needs}, and {given}; {instead}.")


def block_names(host: nn.Module) -> tuple[str, ...]:
    """The residual blocks of a host, outermost first: where depth may grow."""
    return tuple(name for name, part in host.named_modules() if name and hasattr(part, "output_layers"))
