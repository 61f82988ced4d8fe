"""How a host calls one of its blocks, so that a grown block beside it can be called the same way with another activation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from esper.errors import UserError


@dataclass(frozen=True)
class BlockCall:
    """The arguments that the host gives beside the activation: masks, positions, another stream. A cache of keys is not passed on.

    ``key`` is the name under which the activation comes, empty where it is the first argument; ``cached`` the positions that the
    host's cache holds, those of this call among them.
    """

    rest: tuple[Any, ...] = ()
    named: dict[str, Any] = field(default_factory=dict)
    key: str = ""
    cached: int = 0

    @classmethod
    def of(cls, inputs: tuple[Any, ...], named: Mapping[str, Any]) -> BlockCall:
        """The call that a module has just answered."""
        if len(inputs) == 1 and not named:
            return PLAIN_CALL
        values = [*inputs, *named.values()]
        cached = max((int(value.get_seq_length()) for value in values if _is_cache(value)), default=0)
        key = "" if inputs else next((name for name, value in named.items() if isinstance(value, Tensor)), "")
        kept = {name: _but_caches(value) for name, value in named.items() if name != key}
        return cls(tuple(map(_but_caches, inputs[1:])), kept, key, cached)

    def answer(self, block: nn.Module, y: Tensor, parameters: dict[str, Tensor] | None = None) -> Tensor:
        """The output of ``block`` for ``y``, with other ``parameters`` than its own where given.

        Raises:
            UserError: the host goes on from a cache in which this block has no keys.
        """
        if self.cached and self.cached > y.shape[1]:
            raise UserError("A grown block keeps no keys and values, so a cache cannot be used with it: generate with use_cache=False.")
        given = ((y, *self.rest), self.named) if not self.key else ((), {**self.named, self.key: y})
        output = block(*given[0], **given[1]) if parameters is None else torch.func.functional_call(block, parameters, *given)
        result = first_tensor(output)
        assert result is not None, f"{type(block).__name__} gives no tensor"
        return result

    def detached(self) -> BlockCall:
        """The same without the graph that its tensors come from."""
        return BlockCall(_detached(self.rest), _detached(self.named), self.key, self.cached)


PLAIN_CALL = BlockCall()


class Chain(nn.ModuleList):
    """Blocks run one behind the other, each called as the host calls its own."""

    def forward(self, *inputs: Any, **named: Any) -> Tensor:
        """The activation after the last block, ``[…]`` as the first one got it."""
        call, x = BlockCall.of(inputs, named), first_tensor(inputs or named)
        assert x is not None, "a block is given a tensor"
        for block in self:
            x = call.answer(block, x)
        return x


def first_tensor(output: Any) -> Tensor | None:
    """The activation in a module's output: the tensor itself, or the first of a tuple, list, mapping or dataclass."""
    if isinstance(output, Tensor):
        return output
    values: list[Any] = []
    if isinstance(output, (tuple, list)):
        values = list(output)
    elif isinstance(output, Mapping):
        values = list(output.values())
    elif dataclasses.is_dataclass(output):
        values = [getattr(output, entry.name) for entry in dataclasses.fields(output)]
    return values[0] if values and isinstance(values[0], Tensor) else None


def map_first_tensor(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """``output`` with ``change`` applied to the tensor that ``first_tensor`` finds in it.

    A nested tensor, which torch's encoder makes of padded sequences, is changed sequence by sequence.
    """
    if isinstance(output, Tensor):
        return _changed(output, change)
    if isinstance(output, Mapping):
        name, first = next(iter(output.items()))
        changed = {**output, name: _changed(first, change)}
        return changed if type(output) is dict else type(output)(**changed)
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        name = dataclasses.fields(output)[0].name
        return dataclasses.replace(output, **{name: _changed(getattr(output, name), change)})
    values = [_changed(output[0], change), *output[1:]]
    return type(output)(*values) if hasattr(output, "_fields") else type(output)(values)


def _changed(value: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    if not value.is_nested:
        return change(value)
    parts = [change(part.unsqueeze(0)).squeeze(0) for part in value.unbind()]
    return torch.nested.as_nested_tensor(parts, layout=value.layout)


def _is_cache(value: Any) -> bool:
    return callable(getattr(value, "get_seq_length", None)) and not isinstance(value, (Tensor, nn.Module))


def _but_caches(value: Any) -> Any:
    return None if _is_cache(value) else value


def _detached(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, dict):
        return {key: _detached(part) for key, part in value.items()}
    return tuple(map(_detached, value)) if type(value) is tuple else value
