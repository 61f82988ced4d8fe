"""The axis of a tensor that holds its features, followed function by function from the layers that determine it.

Linear layers, layer norms and embeddings put features last; convolutions and batch norms put them on the axis before the positions.
Transposing moves them, reshaping may merge them with another axis, and all other functions keep their axis.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from esper.distributed.sharding import class_name


@dataclass(frozen=True)
class TracedInput:
    """A tensor that a function was given: its shape, the axis of its features if known, how old it is, whether it is a weight."""

    shape: torch.Size
    axis: int | None
    age: int
    weight: bool

    @property
    def last(self) -> bool:
        """Whether the features lie on the last axis."""
        return self.axis == len(self.shape) - 1


_LAST = frozenset(
    [
        "linear",
        "bilinear",
        "addmm",
        "layer_norm",
        "rms_norm",
        "embedding",
        "embedding_bag",
        "lstm",
        "gru",
        "rnn_tanh",
        "rnn_relu",
        "scaled_dot_product_attention",
        "multi_head_attention_forward",
    ]
)
_SECOND = frozenset(("batch_norm", "instance_norm", "group_norm"))
_PRODUCTS = frozenset(("matmul", "mm", "bmm", "rmatmul"))
_MOVED = frozenset(("transpose", "permute", "swapaxes", "swapdims", "movedim", "moveaxis", "t", "adjoint", "T", "mT", "H", "mH"))
_RESHAPED = frozenset(("view", "reshape", "view_as", "reshape_as", "flatten", "unflatten", "ravel", "squeeze", "unsqueeze"))
_CONVOLUTIONS = {f"{kind}{n}d": n for n in (1, 2, 3) for kind in ("conv", "conv_transpose")}
_POOLS = {f"{kind}_pool{n}d": n for n in (1, 2, 3) for kind in ("max", "avg", "lp", "adaptive_max", "adaptive_avg")}


def axis_after(kind: str, call: Callable[[Tensor], Tensor], given: list[TracedInput], out: torch.Size) -> int | None:
    """The axis of the features in the result of a function of this kind for some tensors; None where it is not known.

    ``call`` is the function with another tensor in the place of those given. Where streams meet, the features have the axis of the
    oldest.
    """
    dims = len(out)
    if not dims:
        return None
    if kind in _LAST:
        return dims - 1
    if kind in _SECOND:
        return 1
    if kind in _CONVOLUTIONS:
        return dims - 1 - _CONVOLUTIONS[kind]
    if kind in _PRODUCTS:
        return _of_product(given[::-1] if kind == "rmatmul" else given, dims)
    placed = sorted((one for one in given if one.axis is not None), key=lambda one: (len(one.shape) != dims, one.age))
    if not placed:
        return dims - 1 - _POOLS[kind] if kind in _POOLS else None
    shape, axis = placed[0].shape, placed[0].axis
    assert axis is not None
    if kind in _MOVED:
        return _moved(call, len(shape), axis)
    if kind in _RESHAPED:
        return _reshaped(shape, axis, out)
    return axis if len(shape) == dims else _fewer(shape, axis, out)


def axis_of_kind(module: nn.Module, dims: int) -> int | None:
    """Where a layer puts its features by the name of its kind, for the few whose functions cannot be followed."""
    name = type(module).__name__
    if is_linear(module) or any(word in name for word in ("Linear", "LayerNorm", "RMSNorm", "Embedding")):
        return dims - 1
    if dims > 1 and any(word in name for word in ("Conv", "BatchNorm", "InstanceNorm", "GroupNorm", "Pool")):
        return 1
    return None


def is_linear(module: nn.Module) -> bool:
    """A linear layer of torch, or the ``Conv1D`` that transformers' GPT-2 has for one."""
    return isinstance(module, nn.Linear) or (class_name(module) == "Conv1D" and hasattr(module, "nf"))


def inputs_of(linear: nn.Module) -> int:
    """Features that a linear layer reads; transformers' ``Conv1D`` has them on the first axis of its weight."""
    weight = linear.weight  # no parameter of its own where it is parametrized
    assert isinstance(weight, Tensor)
    return weight.shape[1 if isinstance(linear, nn.Linear) else 0]


def _of_product(given: list[TracedInput], dims: int) -> int | None:
    """Rows come from the left operand, columns from the right; a weight's own axes are features."""
    if len(given) != 2 or dims < 2:
        return dims - 1
    left, right = given
    if right.weight or right.last:
        return dims - 1
    return dims - 2 if left.weight or left.axis == len(left.shape) - 2 else None


def _moved(call: Callable[[Tensor], Tensor], dims: int, axis: int) -> int:
    """Asked of the function itself: in a view of an empty tensor, an axis is known by its stride."""
    marker = torch.empty(tuple(range(2, 2 + dims)), device="meta")
    stride = marker.stride(axis)
    return list(call(marker).stride()).index(stride)


def _reshaped(before: torch.Size, axis: int, after: torch.Size) -> int | None:
    """The axis of the same size with as much before it; else the last one, where the last ones were merged."""
    ahead = math.prod(before[:axis])
    for place, size in enumerate(after):
        if size == before[axis] and math.prod(after[:place]) == ahead:
            return place
    merged = axis == len(before) - 1 and len(after) < len(before)
    return len(after) - 1 if merged else None


def _fewer(before: torch.Size, axis: int, after: torch.Size) -> int | None:
    """After an axis was taken away (or another added): counted from the end where the features were last, else from the front."""
    place = len(after) - 1 if axis == len(before) - 1 else axis
    return place if 0 <= place < len(after) and after[place] == before[axis] else None
