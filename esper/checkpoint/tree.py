"""A state as a tree of plain values and tensors ⇄ JSON and named tensors.

Plain values are dicts with text keys, lists, text, whole numbers, floats, booleans and None. Nothing else is accepted in
either direction, so reading a state can build nothing but these.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from esper.errors import UserError

TENSOR, FLOAT = "$tensor", "$float"


@dataclass(frozen=True)
class Still:
    """A part of a state whose tensors no longer change, so that they need no copy."""

    tree: Any


def split(tree: Any) -> tuple[Any, dict[str, Tensor]]:
    """(JSON-able tree, copies of its tensors on the CPU by name); a tensor is named by its path."""
    tensors: dict[str, Tensor] = {}
    return _split(tree, "", tensors, True), tensors


def join(plain: Any, tensors: dict[str, Tensor]) -> Any:
    """The tree again. Raises ValueError when a tensor is missing or left over, or a value cannot come from ``split``."""
    left = dict(tensors)
    tree = _join(plain, left)
    if left:
        raise ValueError(f"{len(left)} tensors belong to nothing, the first is '{next(iter(left))}'")
    return tree


def kept(tree: Any) -> Any:
    """The tree with copies of its tensors, which may outlive the file that tensors are read from."""
    if isinstance(tree, Tensor):
        return tree.clone()
    if isinstance(tree, dict):
        return {key: kept(value) for key, value in tree.items()}
    return [kept(value) for value in tree] if isinstance(tree, list) else tree


@contextmanager
def fitting() -> Iterator[None]:
    """Context in which a state of another form raises a UserError, instead of whatever error comes first."""
    try:
        yield
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, RuntimeError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise UserError(
            f"The saved state cannot be taken over: {reason}; it is of something else, made by another version of esper or tampered with."
        ) from error


def _split(tree: Any, path: str, tensors: dict[str, Tensor], copy: bool) -> Any:
    if isinstance(tree, Still):
        return _split(tree.tree, path, tensors, False)
    if isinstance(tree, Tensor):
        value = tree.detach()
        tensors[path] = value.contiguous().clone() if copy and value.device.type == "cpu" else value.cpu().contiguous()
        return {TENSOR: path}
    if isinstance(tree, dict):
        assert all(isinstance(key, str) and not key.startswith("$") for key in tree), f"{path}: keys must be text"
        return {key: _split(value, f"{path}/{key}" if path else key, tensors, copy) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [_split(value, f"{path}/{index}", tensors, copy) for index, value in enumerate(tree)]
    if isinstance(tree, float) and not math.isfinite(tree):
        return {FLOAT: str(tree)}
    assert tree is None or isinstance(tree, (str, int, float)), f"{path}: {type(tree).__name__} cannot be saved"
    return tree


def _join(plain: Any, left: dict[str, Tensor]) -> Any:
    if isinstance(plain, dict):
        if plain.keys() == {TENSOR}:
            if plain[TENSOR] not in left:
                raise ValueError(f"the tensor '{plain[TENSOR]}' is missing")
            return left.pop(plain[TENSOR])
        if plain.keys() == {FLOAT}:
            if plain[FLOAT] not in ("nan", "inf", "-inf"):
                raise ValueError(f"'{plain[FLOAT]}' is no number")
            return float(plain[FLOAT])
        return {key: _join(value, left) for key, value in plain.items()}
    if isinstance(plain, list):
        return [_join(value, left) for value in plain]
    return plain


def same(a: Any, b: Any) -> bool:
    """Whether two trees hold the same values, bit for bit (a NaN equals itself)."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and bytes_of(a) == bytes_of(b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float) and isinstance(b, float) and math.isnan(a):
        return math.isnan(b)
    return type(a) is type(b) and bool(a == b)


def bytes_of(tensor: Tensor) -> bytes:
    """The bytes of a tensor, row by row."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
