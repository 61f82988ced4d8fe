"""The telemetry op: a site's activations read once, never written."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.library import custom_op

from esper.kernels import inactive_chunks, launch_rules, telemetry_kernels
from esper.kernels.active_list import active_list_kernel
from esper.kernels.chunk_layout import as_rows, chunk_width

NARROW = 16
"""Places below which a chunk is no longer copied by itself: at 3 of them that took six times as long as a plain copy."""


@custom_op("esper::telemetry", mutates_args=())
def _telemetry(x: Tensor, seeds: int, near_zero: float) -> Tensor:
    launch = launch_rules.windows(x.shape[2], seeds, x.shape[0] * x.shape[1], launch_rules.limits(x.device))
    if launch is not None:
        return measure_windows(x, seeds, near_zero, launch)
    partial = PartialSums.empty(x, seeds, telemetry=True, copies=False)
    measure_and_copy(x, partial, seeds, near_zero)
    if not partial.whole:
        moments_of_means(x, partial, None)
    return finish(x, partial, None)


@_telemetry.register_fake
def _(x: Tensor, seeds: int, near_zero: float) -> Tensor:
    return x.new_empty(seeds, 4, dtype=torch.float32)


def telemetry(x: Tensor, seeds: int, near_zero: float) -> Tensor:
    """As :func:`esper.kernels.reference.telemetry`, for ``[..., W]`` of any strides on a GPU; float32 ``[seeds, 4]``."""
    if x.numel() == 0:
        return torch.full((seeds, 4), float("nan"), device=x.device)
    measured: Tensor = torch.ops.esper.telemetry(as_rows(x.detach()), seeds, near_zero)
    return measured


def chunk_constants(width: int, seeds: int) -> dict[str, object]:
    """The constants that say how wide chunks are, and whether all are."""
    return {"C": chunk_width(width, seeds), "EVEN": width % seeds == 0}


def inactive_chunks_launch(x: Tensor, seeds: int) -> launch_rules.InactiveChunksLaunch:
    """Launch settings of the copying kernel for this site."""
    return launch_rules.inactive_chunks(x.shape[2], seeds, x.shape[0] * x.shape[1], launch_rules.limits(x.device))


def whole_rows_launch(x: Tensor, seeds: int, copies: bool) -> launch_rules.WholeRowsLaunch | None:
    """Launch settings of the kernel over whole rows for this site; None where a row is too wide for it."""
    return launch_rules.whole_rows(x.shape[2], seeds, x.shape[0] * x.shape[1], x.element_size(), launch_rules.limits(x.device), copies)


def means_block(x: Tensor) -> int:
    """Rows a program of the second pass over row means."""
    return min(128, launch_rules.power_of_two(x.shape[0] * x.shape[1]))


@dataclass(frozen=True)
class PartialSums:
    """Partial sums that several kernels fill.

    ``moments [max(parts, blocks), S, 3]`` and ``totals [.., 2]`` of ``parts`` programs over whole rows or ``blocks`` of rows in the second
    pass, ``stats [parts, S, 3]``, ``means [S, rows]``, ``pivots [S]``. ``whole``: rows fit the kernel over whole rows; ``telemetry``:
    measured at all.
    """

    pivots: Tensor
    moments: Tensor
    totals: Tensor
    stats: Tensor
    means: Tensor
    parts: int
    blocks: int
    whole: bool
    telemetry: bool

    @classmethod
    def empty(cls, x: Tensor, seeds: int, telemetry: bool, copies: bool) -> PartialSums:
        """Buffers for a site's ``x [outer, inner, W]``; a single one for all without ``telemetry``. ``copies``: there are branches."""
        launch = whole_rows_launch(x, seeds, copies)
        if not telemetry:
            untouched = x.new_empty(seeds, dtype=torch.float32)
            return cls(untouched, untouched, untouched, untouched, untouched, 0, 0, launch is not None, False)
        rows = x.shape[0] * x.shape[1]
        parts = inactive_chunks_launch(x, seeds).parts if launch is None else launch.parts
        blocks = -(-rows // means_block(x))
        most = max(parts, blocks)

        def room(*shape: int) -> Tensor:
            return x.new_empty(*shape, dtype=torch.float32)

        sums = room(seeds), room(most, seeds, 3), room(most, 2), room(parts, seeds, 3)
        leaves_means = launch is None or copies
        return cls(*sums, room(seeds, rows if leaves_means else 0), parts, blocks, launch is not None, telemetry)

    @property
    def sums(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """In the order in which the kernels take them."""
        return self.pivots, self.moments, self.totals, self.stats

    def size(self, x: Tensor) -> tuple[int, int, int, int, int]:
        """Seeds, width, rows and how many partial sums there are."""
        return self.pivots.shape[0], x.shape[2], x.shape[0] * x.shape[1], self.blocks, self.parts


@dataclass(frozen=True)
class ActiveList:
    """Which seeds are active: ``seeds [banks, S + 1]`` and ``rank [S + 1]`` as ``write_active_list`` fills them from the other tensors."""

    alpha: Tensor
    objective: Tensor | None
    route: Tensor
    seeds: Tensor
    rank: Tensor

    @classmethod
    def empty(cls, alpha: Tensor, objective: Tensor | None, route: Tensor, banks: int) -> ActiveList:
        """Room for a site's active list, which the copying kernels write."""
        return cls(alpha, objective, route, route.new_empty(banks, alpha.shape[0] + 1), route.new_empty(alpha.shape[0] + 1))

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """In the order in which the copying kernels take them."""
        return self.alpha, self.alpha if self.objective is None else self.objective, self.route, self.seeds, self.rank

    @property
    def constants(self) -> dict[str, int]:
        """The number of banks, and of the seeds that the program that writes the list takes at once."""
        return {"BANKS": self.seeds.shape[0], "RB": min(1024, launch_rules.power_of_two(self.alpha.shape[0]))}


def measure_windows(x: Tensor, seeds: int, near_zero: float, launch: launch_rules.WindowsLaunch) -> Tensor:
    """``health [seeds, 4]`` of narrow chunks: first the totals of the rows, then windows of neighbouring chunks."""
    outer, inner, width = x.shape
    rows, blocks = outer * inner, -(-outer * inner // launch.totals_rows)

    def room(*shape: int) -> Tensor:
        return x.new_empty(*shape, dtype=torch.float32)

    sums = room(seeds), room(launch.parts, seeds, 3), room(launch.parts, 2), room(launch.parts, seeds, 3)
    partial = PartialSums(*sums, room(0), launch.parts, 0, True, True)
    row_totals, unsound = room(rows), x.new_empty(blocks, dtype=torch.int32)
    distance = {"FLAT": outer == 1, "XR": row_distance(x)}
    telemetry_kernels.totals_kernel[(blocks,)](
        x, row_totals, unsound, width, rows, inner, *x.stride(),
        BM=launch.totals_rows, BW=min(1024, launch_rules.power_of_two(width)), **distance, num_warps=4,
    )  # fmt: skip
    telemetry_kernels.windows_kernel[(-(-seeds // launch.seeds), launch.parts)](
        x, row_totals, unsound, partial.moments, partial.totals, partial.stats, partial.pivots,
        seeds, width, rows, launch.parts, inner, *x.stride(), near_zero,
        G=launch.seeds, GP=launch.places, WC=launch.width, BM=launch.rows, TM=launch.totals_rows, ALIGN=8, WHOLE=rows % launch.rows == 0,
        **chunk_constants(width, seeds), **distance, PRECISION="ieee", num_warps=4,
    )  # fmt: skip
    return finish(x, partial, None)


def row_distance(x: Tensor) -> int:
    """Distance of two rows in memory, for ``tile_pointers``.

    0 where neighbouring features are not neighbours, rows are not evenly apart, or a block of rows needs 64 bits.
    """
    return x.stride(1) if x.shape[0] == 1 and x.stride(2) == 1 and x.stride(1) < 1 << 22 else 0


def measure_and_copy(
    x: Tensor, partial: PartialSums, seeds: int, near_zero: float, y: Tensor | None = None, active: ActiveList | None = None
) -> None:
    """Measure ``x`` as ``partial`` asks; with ``y`` and ``active`` also copy the chunks without an active branch, and fill ``active``."""
    if partial.telemetry and partial.whole:
        measure_and_copy_rows(x, y, partial, active, seeds, near_zero)
    else:
        measure_and_copy_tiles(x, y, partial, active, seeds, near_zero)


def measure_and_copy_rows(
    x: Tensor, y: Tensor | None, partial: PartialSums, active: ActiveList | None, seeds: int, near_zero: float
) -> None:
    """Whole rows, measured and copied."""
    copies, (outer, inner, width) = active is not None, x.shape
    launch = whole_rows_launch(x, seeds, copies)
    assert launch is not None, "PartialSums.whole promises that whole rows fit"
    rows, target = outer * inner, x if y is None else y
    alpha, _, *active_tensors = (x,) * 5 if active is None else active.tensors  # never touched without it
    full = width == seeds * launch.places and seeds == launch.seeds and rows % launch.rows == 0
    telemetry_kernels.whole_rows_kernel[(launch.parts + copies,)](
        x, target, alpha, *active_tensors, partial.means, partial.moments, partial.totals, partial.stats, partial.pivots,
        seeds, width, rows, launch.parts, inner, *x.stride(), *target.stride(), near_zero,
        BM=launch.rows, SP=launch.seeds, CP=launch.places, **chunk_constants(width, seeds), FULL=full, COPY=copies, FLAT=outer == 1,
        STAGES=launch.stages, **({"BANKS": 0, "RB": 1} if active is None else active.constants), num_warps=launch.warps,
    )  # fmt: skip


def measure_and_copy_tiles(
    x: Tensor, y: Tensor | None, partial: PartialSums, active: ActiveList | None, seeds: int, near_zero: float
) -> None:
    """Tiles of whole neighbouring chunks: copied (with ``y``) and measured if ``partial`` does; all of them without ``active``.

    Narrow chunks that need no measuring are copied with everything else: copying the active ones in vain costs less than
    looking which of them are.
    """
    outer, inner, width = x.shape
    if y is not None and active is not None and not partial.telemetry and chunk_width(width, seeds) < NARROW:
        y.copy_(x)
        fill_active_list(active, seeds)
        return
    launch, copies = inactive_chunks_launch(x, seeds), active is not None
    target = x if y is None else y
    active_tensors = (x,) * 5 if active is None else active.tensors  # never touched without it
    full = width == seeds * launch.places and seeds % launch.seeds == 0 and outer * inner % launch.rows == 0
    inactive_chunks.inactive_chunks_kernel[(-(-seeds // launch.seeds) * launch.parts + copies,)](
        x, target, *active_tensors, partial.stats, partial.means, partial.pivots,
        seeds, width, outer * inner, launch.parts, inner, *x.stride(), *target.stride(), near_zero,
        BM=launch.rows, SB=launch.seeds, CB=launch.places, WIDE=chunk_width(width, seeds) > launch.places,
        **chunk_constants(width, seeds), FULL=full,
        COPY=y is not None, TELEMETRY=partial.telemetry, ALL=not copies, FLAT=outer == 1, STAGES=launch.stages,
        OBJECTIVES=active is not None and active.objective is not None,
        **({"BANKS": 0, "RB": 1} if active is None else active.constants), num_warps=4,
    )  # fmt: skip


def fill_active_list(active: ActiveList, seeds: int) -> None:
    """Fill ``active`` where no kernel that copies does it."""
    constants = {"OBJECTIVES": active.objective is not None, "BANKS": active.constants["BANKS"], "SB": active.constants["RB"]}
    active_list_kernel[(1,)](*active.tensors, seeds, **constants, num_warps=4)


def moments_of_means(x: Tensor, partial: PartialSums, active: ActiveList | None) -> None:
    """Second pass over ``means``: row totals, and every seed's moments with them."""
    seeds, block = partial.pivots.shape[0], means_block(x)
    group = min(16384 // block, launch_rules.power_of_two(seeds))
    telemetry_kernels.moments_kernel[(partial.blocks,)](
        partial.means, partial.pivots if active is None else active.rank, partial.moments, partial.totals,
        seeds, x.shape[2], x.shape[0] * x.shape[1], **chunk_constants(x.shape[2], seeds), WHOLE=partial.whole and active is not None,
        BM=block, SB=group, ONCE=group >= seeds, num_warps=8,
    )  # fmt: skip


def health_group(seeds: int) -> tuple[int, int]:
    """Seeds and partial sums that a program of the last step takes at once."""
    return (1, 512) if seeds <= 1024 else (128, 32)


def finish(x: Tensor, partial: PartialSums, active: ActiveList | None) -> Tensor:
    """Reduce partial sums to ``health [seeds, 4]``; with ``active``, those of a site with branches."""
    seeds = partial.pivots.shape[0]
    health, (group, parts) = x.new_empty(seeds, 4, dtype=torch.float32), health_group(seeds)
    telemetry_kernels.finish_kernel[(-(-seeds // group),)](
        partial.pivots if active is None else active.rank, *partial.sums, health, *partial.size(x), **chunk_constants(x.shape[2], seeds),
        WHOLE=partial.whole, CHOICE=active is not None, SB=group, PB=parts, num_warps=4,
    )  # fmt: skip
    return health
