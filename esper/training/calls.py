"""What a model is called with, for training loops that do not show their batches to callbacks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from esper.seeds.layer import ATTRIBUTE, Attached


class Calls(Attached):
    """Remembers the named arguments and the loss of a model's training forwards; meanwhile ``state_dict()`` is the host's alone.

    Args:
        model: the host, whose output has a ``loss``.
        hidden: arguments that are no part of a batch.
        share: from the named arguments, what part of the step's loss this forward's loss is.
        after: called when the backward pass of a training forward is done, before anybody sees its gradients.
    """

    def __init__(
        self, model: nn.Module, hidden: tuple[str, ...], share: Callable[[dict[str, Any]], float], after: Callable[[], None]
    ) -> None:
        self.batch: dict[str, Any] | None = None
        self._hidden, self._share, self._after = hidden, share, after
        self._losses: list[Tensor] = []
        self._handles = [model.register_forward_hook(self._remember, with_kwargs=True), model.register_state_dict_post_hook(_HostAlone())]

    def _remember(self, model: nn.Module, inputs: Any, named: dict[str, Any], output: Any) -> None:
        if model.training and torch.is_grad_enabled() and self.batch is None:
            self.batch = {name: value for name, value in named.items() if name not in self._hidden}
            self._losses.append(output["loss"].detach() * self._share(named))
            if output["loss"].requires_grad:
                output["loss"].register_hook(self._when_done)

    def _when_done(self, gradient: Tensor) -> None:
        """The backward pass has begun: the engine calls ``after`` at its end, as it does for torch's own FSDP."""
        torch.autograd.Variable._execution_engine.queue_callback(self._after)  # type: ignore[attr-defined]

    def loss(self) -> Tensor | None:
        """The loss of the step that has ended, None where no forward was seen; the next step begins."""
        losses, self._losses, self.batch = self._losses, [], None
        return torch.stack(losses).sum() if losses else None

    def close(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()


class _HostAlone(Attached):
    """Leaves what the seeds hold out of a state dict; no bound method, since torch writes on this hook."""

    def __call__(self, model: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        for name in [name for name in state if f"{ATTRIBUTE}." in name]:
            del state[name]
