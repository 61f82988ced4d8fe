"""The telemetry op: a site's activations read once, never written."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.library import triton_op, wrap_triton

from esper.kernels import launch, measure, passing
from esper.kernels.geometry import as_rows, chunk_width


@triton_op("esper::telemetry", mutates_args=())
def _telemetry(x: Tensor, seeds: int, near_zero: float) -> Tensor:
    outer, inner, width = x.shape
    rows = outer * inner
    limit = launch.limits(x.device)
    plan = launch.whole_rows(width, seeds, rows, x.element_size(), limit)
    if plan is None:
        partial = Partial.empty(x, seeds, passing_plan(x, seeds).parts, telemetry=True)
        pass_through(x, None, None, None, partial, seeds, near_zero)
        return health_from_means(x, partial, seeds)
    moments, stats = x.new_empty(2, plan.parts, seeds, 3, dtype=torch.float32).unbind()
    totals, pivots = x.new_empty(plan.parts, 2, dtype=torch.float32), x.new_empty(seeds, dtype=torch.float32)
    full = width == seeds * plan.places and seeds == plan.seeds and rows % plan.rows == 0
    wrap_triton(measure.rows_kernel)[(plan.parts,)](
        x, moments, totals, stats, pivots, seeds, width, rows, plan.parts, inner, *x.stride(), near_zero,
        BM=plan.rows, SP=plan.seeds, CP=plan.places, **evenness(width, seeds), FULL=full, FLAT=outer == 1, STAGES=plan.stages,
        num_warps=plan.warps,
    )  # fmt: skip
    return finish(moments, totals, stats, pivots, width, rows)


@_telemetry.register_fake
def _(x: Tensor, seeds: int, near_zero: float) -> Tensor:
    return x.new_empty(seeds, 4, dtype=torch.float32)


def telemetry(x: Tensor, seeds: int, near_zero: float) -> Tensor:
    """As :func:`esper.kernels.reference.telemetry`, for ``[..., W]`` of any strides on a GPU; float32 ``[seeds, 4]``."""
    if x.numel() == 0:
        return torch.full((seeds, 4), float("nan"), device=x.device)
    return torch.ops.esper.telemetry(as_rows(x.detach()), seeds, near_zero)


def evenness(width: int, seeds: int) -> dict[str, object]:
    """The constants that say how wide chunks are, and whether all are."""
    return {"C": chunk_width(width, seeds), "EVEN": width % seeds == 0}


def passing_plan(x: Tensor, seeds: int) -> launch.PassingLaunch:
    """Launch settings of the copying kernel for this site."""
    return launch.passing(x.shape[2], seeds, x.shape[0] * x.shape[1], launch.limits(x.device))


@dataclass(frozen=True)
class Partial:
    """Partial sums that several kernels fill: ``stats [parts, S, 3]`` (zeros at first), ``means [S, rows]``, ``pivots [S]``."""

    stats: Tensor
    means: Tensor
    pivots: Tensor

    @classmethod
    def empty(cls, x: Tensor, seeds: int, parts: int, telemetry: bool) -> Partial:
        """Buffers for a site's ``x [outer, inner, W]``; kernels with fewer parts leave the rest of ``stats`` zero."""
        rows = x.shape[0] * x.shape[1] if telemetry else 0
        stats = x.new_zeros(parts, seeds, 3, dtype=torch.float32)
        return cls(stats, x.new_empty(seeds, rows, dtype=torch.float32), x.new_empty(seeds, dtype=torch.float32))

    @property
    def telemetry(self) -> bool:
        """Whether the call measures."""
        return self.means.shape[1] > 0


def pass_through(
    x: Tensor, y: Tensor | None, alpha: Tensor | None, route: Tensor | None, partial: Partial, seeds: int, near_zero: float
) -> None:
    """Copy (with ``y``) and measure (if ``partial`` does) the chunks without an active branch; all of them without ``alpha``."""
    outer, inner, width = x.shape
    plan = passing_plan(x, seeds)
    target, stats = x if y is None else y, partial.stats
    full = width == seeds * plan.places and seeds % plan.seeds == 0 and outer * inner % plan.rows == 0
    wrap_triton(passing.passing_kernel)[(-(-seeds // plan.seeds) * plan.parts,)](
        x, target, stats if alpha is None else alpha, stats if route is None else route, stats, partial.means, partial.pivots,
        seeds, width, outer * inner, plan.parts, inner, *x.stride(), *target.stride(), near_zero,
        BM=plan.rows, SB=plan.seeds, CB=plan.places, WIDE=chunk_width(width, seeds) > plan.places, **evenness(width, seeds), FULL=full,
        COPY=y is not None, TELEMETRY=partial.telemetry, ALL=alpha is None, FLAT=outer == 1, STAGES=plan.stages, num_warps=4,
    )  # fmt: skip


def health_from_means(x: Tensor, partial: Partial, seeds: int) -> Tensor:
    """Second pass over ``means``: row totals, and every seed's moments with them."""
    means, width, rows = partial.means, x.shape[2], partial.means.shape[1]
    block = min(128, launch.power_of_two(rows))
    group = min(8192 // block, launch.power_of_two(seeds))
    blocks = -(-rows // block)
    moments, totals = means.new_empty(blocks, seeds, 3), means.new_empty(blocks, 2)
    wrap_triton(measure.moments_kernel)[(blocks,)](
        means, moments, totals, seeds, width, rows, **evenness(width, seeds), BM=block, SB=group, num_warps=8
    )
    return finish(moments, totals, partial.stats, partial.pivots, width, rows)


def finish(moments: Tensor, totals: Tensor, stats: Tensor, pivots: Tensor, width: int, rows: int) -> Tensor:
    """Reduce partial sums to ``health [seeds, 4]``."""
    seeds = pivots.shape[0]
    health = pivots.new_empty(seeds, 4)
    group, parts = (1, 256) if seeds <= 1024 else (128, 32)
    wrap_triton(measure.finish_kernel)[(-(-seeds // group),)](
        pivots, moments, totals, stats, health, seeds, width, rows,
        moments.shape[0], totals.shape[0], stats.shape[0], **evenness(width, seeds), SB=group, PB=parts, num_warps=4,
    )  # fmt: skip
    return health
