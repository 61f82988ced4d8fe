"""AdamW of a whole slot bank in one launch: gradient norms, containment, clipping, warm-up and the step, a slot a program."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def squared_norm(g, slot, N: tl.constexpr, BN: tl.constexpr):
    """The sum of squares of one tensor's gradient at ``slot``."""
    total = tl.zeros([BN], tl.float32)
    for first in range(0, N, BN):
        place = first + tl.arange(0, BN)
        value = tl.load(g + slot * N + place, mask=place < N, other=0.0)
        total += value * value
    return tl.sum(total, 0)


@triton.jit
def step_tensor(p, g, m, v, slot, rate, first_rest, second_root, scale, decay, beta1, beta2, eps, N: tl.constexpr, BN: tl.constexpr):
    """The step of one tensor at ``slot``; ``first_rest`` = 1 − β₁ᵗ, ``second_root`` = √(1 − β₂ᵗ)."""
    for first in range(0, N, BN):
        place = first + tl.arange(0, BN)
        known, at = place < N, slot * N + place
        gradient = tl.load(g + at, mask=known, other=0.0) * scale
        average = beta1 * tl.load(m + at, mask=known, other=0.0) + (1.0 - beta1) * gradient
        square = beta2 * tl.load(v + at, mask=known, other=0.0) + (1.0 - beta2) * gradient * gradient
        value = tl.load(p + at, mask=known, other=0.0) * decay
        tl.store(m + at, average, mask=known)
        tl.store(v + at, square, mask=known)
        tl.store(p + at, value - rate / first_rest * average / (tl.sqrt(square) / second_root + eps), mask=known)


@triton.jit
def adamw_kernel(
    p0, g0, m0, v0, p1, g1, m1, v1, p2, g2, m2, v2, p3, g3, m3, v3, p4, g4, m4, v4, p5, g5, m5, v5, learning, steps, norms,
    lr, warmup, log1, log2, beta1, beta2, eps, weight_decay, clip,
    N0: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, N3: tl.constexpr, N4: tl.constexpr, N5: tl.constexpr,
    CLIP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """``norms[slot]`` for every slot; a slot that is ``learning`` and whose norm is finite is stepped, and its step counted.

    ``log1`` and ``log2`` are the logarithms of the betas; powers are taken in float64, since 1 − β₂ᵗ cancels.
    """
    slot = tl.program_id(0).to(tl.int64)
    total = squared_norm(g0, slot, N0, BN) + squared_norm(g1, slot, N1, BN) + squared_norm(g2, slot, N2, BN)
    total += squared_norm(g3, slot, N3, BN) + squared_norm(g4, slot, N4, BN) + squared_norm(g5, slot, N5, BN)
    norm = tl.sqrt(total)
    tl.store(norms + slot, norm)
    if (tl.load(learning + slot) == 0) | ((norm < float("inf")) == 0):
        return
    step = tl.load(steps + slot) + 1.0
    tl.store(steps + slot, step)
    rate = lr * tl.minimum(step / warmup, 1.0)
    wide = step.to(tl.float64)
    first_rest = (1.0 - tl.exp(wide * log1)).to(tl.float32)
    second_root = tl.sqrt((1.0 - tl.exp(wide * log2)).to(tl.float32))
    scale = 1.0
    if CLIP:
        scale = tl.minimum(clip / (norm + 1e-6), 1.0)
    decay = 1.0 - rate * weight_decay
    step_tensor(p0, g0, m0, v0, slot, rate, first_rest, second_root, scale, decay, beta1, beta2, eps, N0, BN)
    step_tensor(p1, g1, m1, v1, slot, rate, first_rest, second_root, scale, decay, beta1, beta2, eps, N1, BN)
    step_tensor(p2, g2, m2, v2, slot, rate, first_rest, second_root, scale, decay, beta1, beta2, eps, N2, BN)
    step_tensor(p3, g3, m3, v3, slot, rate, first_rest, second_root, scale, decay, beta1, beta2, eps, N3, BN)
    step_tensor(p4, g4, m4, v4, slot, rate, first_rest, second_root, scale, decay, beta1, beta2, eps, N4, BN)
    step_tensor(p5, g5, m5, v5, slot, rate, first_rest, second_root, scale, decay, beta1, beta2, eps, N5, BN)


@dataclass(frozen=True)
class AdamWSettings:
    """AdamW (Loshchilov & Hutter 2019); ``lr`` is the rate after ``warmup`` steps of a slot's own, ``clip`` 0 is off."""

    lr: float
    warmup: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    clip: float


def adamw(held: list[tuple[Tensor, Tensor, Tensor, Tensor]], learning: Tensor, steps: Tensor, settings: AdamWSettings) -> Tensor:
    """Step ``(values, gradients, first, second)`` ``[capacity, …]`` in place; returns the gradients' norms ``[capacity]``, before clipping.

    ``learning`` bool ``[capacity]``, ``steps`` float32 ``[capacity]``. At most six tensors, float32 and contiguous.
    """
    assert 0 < len(held) <= 6, "the kernels' branches have at most six tensors"
    sizes = [values[0].numel() for values, *_ in held]
    norms = torch.empty_like(steps)
    tensors = [tensor for entry in [*held, *held[:1] * (6 - len(held))] for tensor in entry]  # an absent one is never touched
    adamw_kernel[(len(steps),)](
        *tensors, learning, steps, norms,
        settings.lr, settings.warmup, _log(settings.beta1), _log(settings.beta2),
        settings.beta1, settings.beta2, settings.eps, settings.weight_decay, settings.clip,
        **{f"N{place}": size for place, size in enumerate(sizes + [0] * (6 - len(sizes)))},
        CLIP=settings.clip > 0.0, BN=min(1024, triton.next_power_of_2(max(sizes))), num_warps=4,
    )  # fmt: skip
    return norms


def _log(beta: float) -> float:
    return math.log(beta) if beta > 0.0 else -math.inf
