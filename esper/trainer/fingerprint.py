"""The fingerprint of a run: equal when two runs ended with the same bits after the same curves."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor


def fingerprint(weights: Mapping[str, Tensor], history: Iterable[tuple[int, str, float]]) -> str:
    """SHA-256, in hexadecimal, over final weights and metric history.

    Args:
        weights: parameters and buffers by name, any shape, dtype and device; order does not count, bits do.
        history: ``(tick, name, value)`` in the order it was recorded. Values measured with a clock do not belong in it:
            leave them out (``untimed``).
    """
    digest = hashlib.sha256(b"esper fingerprint 1\n")
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().contiguous()
        _text(digest, f"{name} {tensor.dtype!s} {tuple(tensor.shape)}")
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")
    for tick, name, value in history:
        _text(digest, name)
        digest.update(struct.pack("<qd", tick, value))
    return digest.hexdigest()


def untimed(history: Iterable[tuple[int, str, float]]) -> list[tuple[int, str, float]]:
    """The history without values measured with a clock: names whose last part holds ``seconds`` or ``per_second``."""
    return [item for item in history if "second" not in item[1].rsplit("/", 1)[-1]]


def _text(digest: hashlib._Hash, text: str) -> None:
    data = text.encode()
    digest.update(struct.pack("<q", len(data)) + data)
