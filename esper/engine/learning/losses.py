"""The loss as users have it: a function or the model's own, giving a tensor, or an output with ``loss`` in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from esper.engine.judging.judge import LossFunction
from esper.errors import UserError


def as_tensor_loss(loss: Callable[[nn.Module, Any], Any] | None) -> LossFunction:
    """``loss(model, batch)`` as a function that always gives a tensor.

    ``None`` is the model's own: ``model(**batch)`` for a mapping, ``model(*batch)`` for a tuple or list, whose output must
    carry ``loss``, as an attribute or a key (as transformers' models give where the batch has ``labels``).
    """
    ask = own_loss if loss is None else loss

    def measure(model: nn.Module, batch: Any) -> Tensor:
        result = ask(model, batch)
        value = result if isinstance(result, Tensor) and loss is not None else _loss_in(result)
        if not isinstance(value, Tensor) or not value.is_floating_point():
            kind = type(result).__name__
            if loss is None:
                raise UserError(f"The model gave a {kind} without .loss: pass loss=…, a function of model and batch, or give labels.")
            raise UserError(f"loss(model, batch) gave a {kind}; it must give a tensor (the mean, or one a sample) or an output with .loss.")
        return value

    return measure


def own_loss(model: nn.Module, batch: Any) -> Any:
    """The output of the model for a batch, which is expected to hold its loss."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


def _loss_in(output: Any) -> Any:
    if isinstance(output, Mapping) and "loss" in output:
        return output["loss"]
    return getattr(output, "loss", None)


def told_without(compute: Callable[[nn.Module, dict[str, Any]], Any]) -> Callable[[nn.Module, Any], Any]:
    """transformers' ``Trainer.compute_loss``, which may pop entries of a batch, as ``loss(model, batch)``.

    A batch without the entries it needs is a UserError.
    """

    def loss(model: nn.Module, batch: Any) -> Any:
        try:
            return compute(model, dict(batch))
        except (KeyError, ValueError) as error:
            why = " ".join(str(error).split()).rstrip(".")
            sentence = f"The Trainer finds no loss in a batch ({why}): give judge= batches like those trained on, or loss=."
            raise UserError(sentence) from error

    return loss


def few(batch: Any, samples: int = 1) -> Any:
    """The first samples of a batch, enough to see shapes: every tensor as long as the batch's first is cut."""
    lengths: list[int] = []
    _first_lengths(batch, lengths)
    return _cut(batch, lengths[0], samples) if lengths and lengths[0] > samples else batch


def _first_lengths(part: Any, lengths: list[int]) -> None:
    if isinstance(part, Tensor):
        if part.dim():
            lengths.append(len(part))
    elif isinstance(part, Mapping):
        for value in part.values():
            _first_lengths(value, lengths)
    elif isinstance(part, (tuple, list)):
        for value in part:
            _first_lengths(value, lengths)


def _cut(part: Any, length: int, samples: int) -> Any:
    if isinstance(part, Tensor):
        return part[:samples] if part.dim() and len(part) == length else part
    if isinstance(part, Mapping):
        return {key: _cut(value, length, samples) for key, value in part.items()}
    if isinstance(part, (tuple, list)):
        values = [_cut(value, length, samples) for value in part]
        return type(part)(*values) if hasattr(part, "_fields") else type(part)(values)
    return part


def probing(loss: LossFunction, model: nn.Module, sample: Any, samples: int = 1) -> Callable[[], Tensor]:
    """Runs the model on the first ``samples`` of ``sample``; on all of it where the user's loss cannot do with fewer."""
    chosen = [few(sample, samples)]

    def forward() -> Tensor:
        try:
            return loss(model, chosen[0])
        except (RuntimeError, ValueError, IndexError):
            if chosen[0] is sample:
                raise
            chosen[0] = sample  # a loss that needs whole batches (groups, contrasts): its own error, if any, comes now
            with torch.no_grad():
                return loss(model, sample)

    return forward
