"""Forward of the active chunks, ``y = x + α·δ(x)``, and the containment of branches that are not finite."""

from __future__ import annotations

import triton
import triton.language as tl

from esper.kernels.activations import activate
from esper.kernels.telemetry_kernels import finish
from esper.kernels.triton_helpers import (
    assignment,
    chunk_size,
    chunk_start,
    few_active,
    row_offsets,
    seed_parts,
    tile_pointers,
    weight_tile,
    weight_tile_rows,
)


@triton.jit
def load_block(w1, wg, w2, slot, first, size, C: tl.constexpr, H: tl.constexpr, CP: tl.constexpr, HB: tl.constexpr,
               GATED: tl.constexpr, dtype: tl.constexpr):  # fmt: skip
    """One branch's matrices for the hidden units ``first`` to ``first + HB - 1``: in, gate (in again if there is none), out."""
    col, unit = tl.arange(0, CP), tl.arange(0, HB)
    into = weight_tile(w1, slot, col, unit, first, size, H, C, H, dtype)
    gate = into
    if GATED:
        gate = weight_tile(wg, slot, col, unit, first, size, H, C, H, dtype)
    return into, gate, weight_tile_rows(w2, slot, unit, col, first, H, size, H, C, dtype)


@triton.jit
def bias_rows(b, slot, first, known, N: tl.constexpr, NB: tl.constexpr, BM: tl.constexpr):
    """Entries ``first`` to ``first + NB - 1`` of a bias of N as the first value of an accumulator ``[BM, NB]``.

    Read again for every tile, from the nearest cache: kept over the whole loop they would fill a quarter of the registers.
    """
    place = first + tl.arange(0, NB)
    return tl.broadcast_to(tl.load(b + slot * N + place, mask=place < known, other=0.0).to(tl.float32)[None, :], [BM, NB])


@triton.jit
def hidden_units(x, into, gate, b1, bg, slot, first, H: tl.constexpr, BIAS: tl.constexpr, GATED: tl.constexpr,
                 PRECISION: tl.constexpr):  # fmt: skip
    """Pre-activations ``[BM, HB]`` of one block of hidden units: the value side and, if GATED, the gate side."""
    BM: tl.constexpr = x.shape[0]
    HB: tl.constexpr = into.shape[1]
    if BIAS:
        value = tl.dot(x, into, acc=bias_rows(b1, slot, first, H, H, HB, BM), input_precision=PRECISION)
    else:
        value = tl.dot(x, into, input_precision=PRECISION)
    switch = value
    if GATED:
        switch = tl.dot(x, gate, acc=bias_rows(bg, slot, first, H, H, HB, BM), input_precision=PRECISION)
    return value, switch


@triton.jit
def block_delta(x, delta, into, gate, out, b1, bg, slot, first, H: tl.constexpr, BIAS: tl.constexpr, GATED: tl.constexpr,
                ACT: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Add the part of one block of hidden units to δ."""
    value, switch = hidden_units(x, into, gate, b1, bg, slot, first, H, BIAS, GATED, PRECISION)
    hidden = tl.sigmoid(switch) * value if GATED else activate(value, ACT)
    return tl.dot(hidden.to(x.dtype), out, acc=delta, input_precision=PRECISION)


@triton.jit
def all_blocks_delta(x, delta, w1, b1, wg, bg, w2, slot, size, C: tl.constexpr, H: tl.constexpr, CP: tl.constexpr,
                     HB: tl.constexpr, BIAS: tl.constexpr, GATED: tl.constexpr, ACT: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """δ over all blocks of hidden units, their weights read again for every tile (hidden widths that do not fit at once)."""
    for first in range(0, H, HB):
        into, gate, out = load_block(w1, wg, w2, slot, first, size, C, H, CP, HB, GATED, x.dtype)
        delta = block_delta(x, delta, into, gate, out, b1, bg, slot, first, H, BIAS, GATED, ACT, PRECISION)
    return delta


@triton.jit
def forward_tiles(
    x, y, kept, w1, b1, wg, bg, w2, b2, means, slot, seed, start, size, strength, subtract, pivot, part, parts,
    rows, inner, xo, xi, xc, yo, yi, yc, near_zero,
    C: tl.constexpr, H: tl.constexpr, CP: tl.constexpr, HB: tl.constexpr, BM: tl.constexpr, FULL: tl.constexpr,
    AFFINE: tl.constexpr, BIAS: tl.constexpr, GATED: tl.constexpr, ACT: tl.constexpr,
    TELEMETRY: tl.constexpr, HALF: tl.constexpr, KEEPS: tl.constexpr, FLAT: tl.constexpr, XR: tl.constexpr, YR: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The forward kernel's walk over rows; returns Σ(x-p)², the near-zero count (both 0 without TELEMETRY) and Σδ²."""
    col = tl.arange(0, CP)
    inside = col < size
    if AFFINE:
        scale = tl.load(w1 + slot * C + col, mask=inside, other=0.0)
        shift = tl.load(b2 + slot * C + col, mask=inside, other=0.0)
    elif H <= HB:
        into, gate, out = load_block(w1, wg, w2, slot, 0, size, C, H, CP, HB, GATED, x.dtype.element_ty)
    power = tl.zeros([BM], tl.float32)
    # Neighbouring places lie in one thread: adding eight of them exchanges nothing between threads.
    spread, close = tl.zeros([BM, CP // 8], tl.float32), tl.zeros([BM, CP // 8], tl.float32)
    for block in tl.range(part, tl.cdiv(rows, BM), parts, num_stages=STAGES):
        row = block * BM + tl.arange(0, BM)
        reads = tile_pointers(x, block, start, col, inner, xo, xi, xc, BM, XR, FLAT)
        mask = (row < rows)[:, None] & inside[None, :]
        tile = tl.load(reads) if FULL else tl.load(reads, mask=mask, other=0.0)
        if KEEPS:
            place = tile_pointers(kept + slot * rows * C, block, start * 0, col, rows, 0, C, 1, BM, C, True)
            tl.store(place, tile) if FULL else tl.store(place, tile, mask=mask)
        wide = tile.to(tl.float32)
        if AFFINE:
            delta = wide * scale[None, :] + shift[None, :]
        else:
            delta = bias_rows(b2, slot, 0, size, C, CP, BM) if BIAS else tl.zeros([BM, CP], tl.float32)
            if H <= HB:
                delta = block_delta(tile, delta, into, gate, out, b1, bg, slot, 0, H, BIAS, GATED, ACT, PRECISION)
            else:
                delta = all_blocks_delta(tile, delta, w1, b1, wg, bg, w2, slot, size, C, H, CP, HB, BIAS, GATED, ACT, PRECISION)
        if subtract != 0:
            delta -= wide
        result = wide + strength * delta
        square = delta * delta if FULL else tl.where(mask, delta * delta, 0.0)
        if HALF:
            square = tl.where(mask & (tl.abs(result) > 65504.0), float("inf"), square)
        power += tl.sum(square, 1)
        writes = tile_pointers(y, block, start, col, inner, yo, yi, yc, BM, YR, FLAT)
        tl.store(writes, result.to(y.dtype.element_ty)) if FULL else tl.store(writes, result.to(y.dtype.element_ty), mask=mask)
        if TELEMETRY:
            centred = wide - pivot if FULL else tl.where(mask, wide - pivot, 0.0)
            near = tl.where(tl.abs(wide) < near_zero if FULL else mask & (tl.abs(wide) < near_zero), 1.0, 0.0)
            spread += tl.sum(tl.reshape(centred * centred, [BM, CP // 8, 8]), 2)
            close += tl.sum(tl.reshape(near, [BM, CP // 8, 8]), 2)
            tl.store(means + seed.to(tl.int64) * rows + row, tl.sum(centred, 1) / size, mask=row < rows)
    return tl.sum(tl.sum(spread, 1)), tl.sum(tl.sum(close, 1)), tl.sum(power)


@triton.jit
def chunk_forward_kernel(
    x, y, kept, alpha, route, active_seeds, rank, w1, b1, wg, bg, w2, b2, partial, means, pivots,
    seeds, width, rows, inner, xo, xi, xc, yo, yi, yc, near_zero,
    C: tl.constexpr, H: tl.constexpr, CP: tl.constexpr, HB: tl.constexpr, BM: tl.constexpr, EVEN: tl.constexpr, FULL: tl.constexpr,
    AFFINE: tl.constexpr, BIAS: tl.constexpr, GATED: tl.constexpr, ACT: tl.constexpr,
    TELEMETRY: tl.constexpr, WHOLE: tl.constexpr, HALF: tl.constexpr, KEEPS: tl.constexpr, FLAT: tl.constexpr, XR: tl.constexpr,
    YR: tl.constexpr, STAGES: tl.constexpr, PLAIN_STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: one active seed, every ``parts``-th block of BM rows (see ``assignment``).

    The matrices stay in shared memory over all blocks. ``partial[program]`` gets Σ(x-p)², the near-zero count and Σδ²,
    ``means[seed, row]`` the row's chunk mean minus the pivot p, the chunk's mean in row 0. FULL: no place of a tile is padding.
    KEEPS: ``y`` is ``x``, so the chunk is written to ``kept[slot, row]`` before it changes, for the backward pass and containment.
    TELEMETRY is left out where ``whole_rows_kernel`` has measured all chunks (see ``few_active``); the walk then has PLAIN_STAGES.
    """
    seed, part, parts = assignment(active_seeds, tl.program_id(0), tl.num_programs(0), tl.cdiv(rows, BM))
    if parts == 0:
        return
    strength = tl.load(alpha + seed).to(tl.float32)
    slot = tl.load(route + seed * 3 + 1).to(tl.int64)
    subtract = tl.load(route + seed * 3 + 2) & 1
    start = chunk_start(seed, seeds, width, C, EVEN)
    size = chunk_size(start, seed, seeds, width, C, EVEN)
    pivot = 0.0
    measures = TELEMETRY
    if TELEMETRY:
        measures = few_active(rank, seeds, WHOLE) == 0
    if measures:
        col = tl.arange(0, CP)
        pivot = tl.sum(tl.load(x + (start + col).to(tl.int64) * xc, mask=col < size, other=0.0).to(tl.float32)) / size
        if part == 0:
            tl.store(pivots + seed, pivot)
        spread, close, power = forward_tiles(
            x, y, kept, w1, b1, wg, bg, w2, b2, means, slot, seed, start, size, strength, subtract, pivot, part, parts,
            rows, inner, xo, xi, xc, yo, yi, yc, near_zero,
            C, H, CP, HB, BM, FULL, AFFINE, BIAS, GATED, ACT, TELEMETRY, HALF, KEEPS, FLAT, XR, YR, STAGES, PRECISION,
        )  # fmt: skip
    else:
        spread, close, power = forward_tiles(
            x, y, kept, w1, b1, wg, bg, w2, b2, means, slot, seed, start, size, strength, subtract, pivot, part, parts,
            rows, inner, xo, xi, xc, yo, yi, yc, near_zero,
            C, H, CP, HB, BM, FULL, AFFINE, BIAS, GATED, ACT, False, HALF, KEEPS, FLAT, XR, YR, PLAIN_STAGES, PRECISION,
        )  # fmt: skip
    entry = partial + tl.program_id(0) * 3
    tl.store(entry, spread)
    tl.store(entry + 1, close)
    tl.store(entry + 2, power)


@triton.jit
def containment_kernel(
    x, y, kept, alpha, route, active_seeds, rank, partial, live, power, pivots, moments, totals, stats, health,
    seeds, width, rows, programs, tile_rows, bank, inner, xo, xi, xc, yo, yi, yc, blocks, parts,
    BM: tl.constexpr, BC: tl.constexpr, C: tl.constexpr, EVEN: tl.constexpr, FLAT: tl.constexpr,
    TELEMETRY: tl.constexpr, KEEPS: tl.constexpr, WHOLE: tl.constexpr, FINISH: tl.constexpr, PB: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Containment: a branch whose Σδ² or α is not finite gets its chunk back unchanged and ``live`` = 0, else ``live`` = α.

    The chunk comes from ``x``, or from ``kept`` (KEEPS). One program a seed and row share; without a flagged branch it reads a few numbers
    and leaves. Also brings the forward kernel's partial sums into ``stats[0]``. Run once a bank; the first bank's run settles the seeds
    that have none, and the last one's (FINISH, after ``moments_kernel``) gives every seed's health in the same launch.
    """
    seed, share = tl.program_id(0), tl.program_id(1)
    place = tl.load(rank + seed)
    owner = tl.load(route + seed * 3)
    strength = tl.load(alpha + seed).to(tl.float32)
    if (place < 0) & (bank == 0) & (share == 0):
        tl.store(live + seed, 0.0)
        tl.store(power + seed, 0.0)
    active = (place >= 0) & (owner == bank)
    if FINISH == 0:
        if active == 0:
            return
    count, most = seed_parts(active_seeds, rows, programs, tile_rows, PACKED)
    part = tl.arange(0, 128)
    known = active & (part < most)
    entry = partial + (part * count + place) * 3
    total = tl.sum(tl.load(entry + 2, mask=known, other=0.0))
    fine = (tl.abs(total) < float("inf")) & (tl.abs(strength) < float("inf"))
    if share == 0:
        if active:
            tl.store(live + seed, tl.where(fine, strength, 0.0))
            tl.store(power + seed, total)
        if TELEMETRY:
            known = known & (few_active(rank, seeds, WHOLE) == 0)
            spread = tl.sum(tl.load(entry, mask=known, other=0.0))
            close = tl.sum(tl.load(entry + 1, mask=known, other=0.0))
            if FINISH:
                one = seed + tl.arange(0, 1)
                finish(rank, pivots, moments, totals, stats, health, one, spread, close, active,
                       seeds, width, rows, blocks, parts, C, EVEN, WHOLE, True, PB)  # fmt: skip
            else:
                tl.store(stats + seed * 3, spread, mask=few_active(rank, seeds, WHOLE) == 0)
                tl.store(stats + seed * 3 + 1, close, mask=few_active(rank, seeds, WHOLE) == 0)
    if active & (fine == 0):
        start = chunk_start(seed, seeds, width, C, EVEN)
        size = chunk_size(start, seed, seeds, width, C, EVEN)
        for block in range(share, tl.cdiv(rows, BM), tl.num_programs(1)):
            row = block * BM + tl.arange(0, BM)
            for first in range(0, size, BC):
                col = first + tl.arange(0, BC)
                mask = (row < rows)[:, None] & (col < size)[None, :]
                column = (start + col).to(tl.int64)[None, :]
                if KEEPS:
                    slot = tl.load(route + seed * 3 + 1).to(tl.int64)
                    tile = tl.load(kept + (slot * rows + row)[:, None] * C + col[None, :], mask=mask)
                else:
                    tile = tl.load(x + row_offsets(row, inner, xo, xi, FLAT)[:, None] + column * xc, mask=mask)
                tl.store(y + row_offsets(row, inner, yo, yi, FLAT)[:, None] + column * yc, tile, mask=mask)
