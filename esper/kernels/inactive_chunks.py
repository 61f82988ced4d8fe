"""Chunks that only pass: copied where an output must be written, measured where telemetry is due."""

from __future__ import annotations

import triton
import triton.language as tl

from esper.kernels.active_list import write_active_list
from esper.kernels.triton_helpers import chunk_size, chunk_start, row_offsets


@triton.jit
def inactive_chunks_kernel(
    x, y, alpha, objective, route, active_seeds, rank, stats, means, pivots,
    seeds, width, rows, parts, inner, xo, xi, xc, yo, yi, yc, near_zero,
    BM: tl.constexpr, SB: tl.constexpr, CB: tl.constexpr, WIDE: tl.constexpr, C: tl.constexpr, EVEN: tl.constexpr, FULL: tl.constexpr,
    COPY: tl.constexpr, TELEMETRY: tl.constexpr, ALL: tl.constexpr, FLAT: tl.constexpr, STAGES: tl.constexpr,
    BANKS: tl.constexpr, OBJECTIVES: tl.constexpr, RB: tl.constexpr,
):  # fmt: skip
    """One program: SB neighbouring seeds, every ``parts``-th block of BM rows; CB places a chunk, in several rounds if WIDE.

    ALL takes every seed (nothing is active); otherwise those without an active branch, and one more program writes the active list.
    Outputs as in the forward kernel, with ``stats[part, seed]`` for the partial sums. FULL: chunks of exactly CB places, whole
    blocks of rows and groups of seeds.
    """
    groups = tl.cdiv(seeds, SB)
    if not ALL:
        if tl.program_id(0) == groups * parts:
            write_active_list(alpha, objective, route, active_seeds, rank, seeds, BANKS, OBJECTIVES, RB)
            return
    group, part = tl.program_id(0) % groups, tl.program_id(0) // groups
    seed = group * SB + tl.arange(0, SB)
    mine = seed < seeds
    if not ALL:
        strength = tl.load(alpha + seed, mask=mine, other=0.0)
        bank = tl.load(route + seed * 3, mask=mine, other=-1)
        awake = strength != 0.0
        if OBJECTIVES:
            awake = awake | (tl.load(objective + seed * 2 + 1, mask=mine, other=0.0) != 0.0)
        mine = mine & ((bank < 0) | (awake == 0))
        if tl.max(mine.to(tl.int32)) == 0:
            return
    start = chunk_start(seed, seeds, width, C, EVEN)
    size = chunk_size(start, seed, seeds, width, C, EVEN)
    place = tl.arange(0, CB)
    widest = tl.max(size) if WIDE else CB
    if TELEMETRY:
        pivot = tl.zeros([SB], tl.float32)
        for first in range(0, widest, CB):
            col = first + place
            column = (start[:, None] + col[None, :]).to(tl.int64)
            inside = mine[:, None] & (col[None, :] < size[:, None])
            pivot += tl.sum(tl.load(x + column * xc, mask=inside, other=0.0).to(tl.float32), 1)
        pivot = pivot / size
        if part == 0:
            tl.store(pivots + seed, pivot, mask=mine)
    # Kept element by element: the only exchange between threads in the loop is for the row means.
    spread, close = tl.zeros([BM, SB, CB], tl.float32), tl.zeros([BM, SB, CB], tl.float32)
    for block in tl.range(part, tl.cdiv(rows, BM), parts, num_stages=STAGES):
        row = block * BM + tl.arange(0, BM)
        reads, writes = row_offsets(row, inner, xo, xi, FLAT), row_offsets(row, inner, yo, yi, FLAT)
        total = tl.zeros([BM, SB], tl.float32)
        for first in range(0, widest, CB):
            column = start[:, None] + (first + place)[None, :]
            mask = (row < rows)[:, None, None] & mine[None, :, None]
            if FULL:
                mask = tl.broadcast_to(mine[None, :, None], (BM, SB, CB))
            else:
                mask = mask & ((first + place)[None, :] < size[:, None])[None, :, :]
            tile = tl.load(x + reads[:, None, None] + (column.to(tl.int64) * xc)[None, :, :], mask=mask, other=0.0)
            if COPY:
                tl.store(y + writes[:, None, None] + (column.to(tl.int64) * yc)[None, :, :], tile, mask=mask)
            if TELEMETRY:
                wide = tile.to(tl.float32)
                # A seed that is not ours is not stored, so only padding must not count.
                centred = wide - pivot[None, :, None] if FULL else tl.where(mask, wide - pivot[None, :, None], 0.0)
                near = tl.abs(wide) < near_zero if FULL else mask & (tl.abs(wide) < near_zero)
                total += tl.sum(centred, 2)
                spread += centred * centred
                close += tl.where(near, 1.0, 0.0)
        if TELEMETRY:
            where = seed.to(tl.int64)[None, :] * rows + row[:, None]
            tl.store(means + where, total / size[None, :], mask=(row < rows)[:, None] & mine[None, :])
    if TELEMETRY:
        out = stats + (part * seeds + seed).to(tl.int64) * 3
        tl.store(out, tl.sum(tl.sum(spread, 2), 0), mask=mine)
        tl.store(out + 1, tl.sum(tl.sum(close, 2), 0), mask=mine)
