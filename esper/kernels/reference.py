"""The reference in plain torch: the implementation on a CPU, and the expected result of every kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from esper.kernels.chunk_layout import chunk_bounds, feature_owner, gather_chunks


def telemetry(x: Tensor, seeds: int, near_zero: float) -> Tensor:
    """Health of every chunk of a site in one call: float32 ``[seeds, 4]`` = mean, variance, near-zero fraction, correlation.

    ``x`` is ``[..., W]`` in any memory order (channels-first tensors are read without a copy). The variance is the population's; near
    zero means ``|x| < near_zero``; the correlation is Pearson's, over rows, between the chunk's mean and the mean of all the site's
    other features (0 where it is undefined: one seed, one row, a constant side). NaN and infinity in a chunk show in its mean. With 0 rows
    all is NaN: there was nothing to measure.
    """
    width, before = x.shape[-1], tuple(range(x.dim() - 1))
    rows = x.numel() // width
    if rows == 0:
        return torch.full((seeds, 4), float("nan"), device=x.device)
    x = x.detach()
    x = x if x.dtype == torch.float64 else x.float()
    bounds = chunk_bounds(width, seeds, x.device)
    size = (bounds[1:] - bounds[:-1]).to(x.dtype)
    sums = _chunk_sums(x, seeds)
    means = sums / size
    mean = means.mean(0)
    # Centred before squaring: E[x²] - E[x]² cancels when the mean is large against the spread.
    work = x - mean[feature_owner(width, seeds, x.device)]
    squares = work.square_().sum(before)
    close = torch.abs(x, out=work).lt_(near_zero).sum(before)  # ones and zeros as floats: bools take five times as long to sum
    squares, close = (gather_chunks(total[None], seeds).sum((0, 2)) / (rows * size) for total in (squares, close))
    others = (sums.sum(1, keepdim=True) - sums).div_((width - size).clamp_min(1))
    return torch.stack([mean, squares, close, correlation(means, others)], 1).float()


def _chunk_sums(x: Tensor, seeds: int) -> Tensor:
    """Sum of every chunk of ``x [..., W]`` in every row, ``[rows, seeds]``, summed along the memory where chunks are even."""
    width = x.shape[-1]
    if width % seeds:
        return gather_chunks(x.reshape(-1, width), seeds).sum(2)
    if x.stride(-1) == 1 or x.dim() == 2:
        sums: Tensor = x.unflatten(-1, (seeds, -1)).sum(-1)
    else:
        sums = x.movedim(-1, 1).unflatten(1, (seeds, -1)).sum(2).movedim(1, -1)
    return sums.reshape(-1, seeds)


def correlation(a: Tensor, b: Tensor) -> Tensor:
    """Pearson correlation of the columns of ``a`` and ``b`` (``[rows, n] -> [n]``), 0 where a column is constant up to rounding."""
    rows, mean_a, mean_b = a.shape[0], a.mean(0), b.mean(0)
    a, b = a - mean_a, b - mean_b
    return correlation_of_sums(a.square().sum(0) / rows, b.square().sum(0) / rows, (a * b).sum(0) / rows, mean_a, mean_b)


def correlation_of_sums(variance_a: Tensor, variance_b: Tensor, covariance: Tensor, mean_a: Tensor, mean_b: Tensor) -> Tensor:
    """Pearson correlation from second moments; 0 where a variance is within float32 rounding of a constant (1e-12 of mean²)."""
    varies = (variance_a > 1e-12 * mean_a.square()) & (variance_b > 1e-12 * mean_b.square())
    scale = torch.where(varies, variance_a * variance_b, torch.ones_like(variance_a)).sqrt()
    return torch.where(varies, covariance / scale, torch.zeros_like(scale)).clamp(-1, 1)
