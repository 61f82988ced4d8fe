"""Where the chunks of a site lie, and a site's activation as rows of features."""

from __future__ import annotations

import torch
from torch import Tensor


def chunk_width(width: int, seeds: int) -> int:
    """Widest chunk of a site: ``ceil(width / seeds)`` features. Banks are padded to it."""
    assert 1 <= seeds <= width, f"{seeds} seeds cannot share {width} features"
    return -(-width // seeds)


def chunk_bounds(width: int, seeds: int, device: torch.device | str = "cpu") -> Tensor:
    """int64 ``[seeds + 1]``: seed ``s`` owns the features ``bounds[s]`` to ``bounds[s + 1] - 1``, ``bounds[s] = floor(s*width/seeds)``."""
    return torch.arange(seeds + 1, device=device) * width // seeds


def feature_owner(width: int, seeds: int, device: torch.device | str = "cpu") -> Tensor:
    """int64 ``[width]``: the seed that owns each feature, the inverse of :func:`chunk_bounds`."""
    return ((torch.arange(width, device=device) + 1) * seeds - 1) // width


def padded_index(width: int, seeds: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Feature index ``[seeds, C]`` and mask ``[seeds, C]`` of the chunks padded to one width ``C``.

    A padded place repeats the chunk's own first feature, so that no other seed's value, NaN included, is ever touched.
    """
    bounds = chunk_bounds(width, seeds, device)
    place = torch.arange(chunk_width(width, seeds), device=device)
    start, size = bounds[:-1, None], (bounds[1:] - bounds[:-1])[:, None]
    mask = place < size
    return torch.where(mask, start + place, start), mask


def gather_chunks(x: Tensor, seeds: int) -> Tensor:
    """``[rows, W] -> [rows, seeds, C]``, padded places zero; a view where all chunks are equally wide."""
    rows, width = x.shape
    if width % seeds == 0:
        return x.view(rows, seeds, width // seeds) if x.is_contiguous() else x.unflatten(1, (seeds, width // seeds))
    index, mask = padded_index(width, seeds, x.device)
    return x.index_select(1, index.flatten()).view(rows, *index.shape).masked_fill(~mask, 0)


def as_rows(x: Tensor) -> Tensor:
    """View ``[..., W]`` as ``[outer, inner, W]`` without a copy where two strides can address all rows, else a contiguous copy.

    Channels-first images seen through ``movedim(1, -1)`` are such views: rows of one image follow each other, images do not.
    """
    width, lead = x.shape[-1], [(size, stride) for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True) if size != 1]
    merged: list[tuple[int, int]] = []
    for size, stride in lead:
        if merged and merged[-1][1] == stride * size:
            merged[-1] = (merged[-1][0] * size, stride)
        else:
            merged.append((size, stride))
    if x.numel() == 0 or len(merged) > 2:
        return x.reshape(1, -1, width) if x.numel() else x.new_empty(1, 0, width)
    outer, inner = [(1, 0)] * (2 - len(merged)) + merged
    return x.view(outer[0], inner[0], width)
