"""Forward of the active chunks, ``y = x + α·δ(x)``, and the containment of branches that are not finite."""

from __future__ import annotations

import triton
import triton.language as tl

from esper.kernels.language import activate, assignment, chunk_size, chunk_start, row_offsets, weight_tile, weight_tile_rows


@triton.jit
def load_block(w1, b1, wg, bg, w2, slot, first, size, C: tl.constexpr, H: tl.constexpr, CP: tl.constexpr, HB: tl.constexpr,
               BIAS: tl.constexpr, GATED: tl.constexpr, dtype: tl.constexpr):  # fmt: skip
    """One branch's weights for the hidden units ``first`` to ``first + HB - 1``: in, its bias, gate, its bias, out."""
    col, unit = tl.arange(0, CP), tl.arange(0, HB)
    into = weight_tile(w1, slot, col, unit, first, size, H, C, H, dtype)
    bias = tl.zeros([HB], tl.float32)
    gate, gate_bias = into, bias
    if BIAS:
        bias = tl.load(b1 + slot * H + first + unit, mask=first + unit < H, other=0.0)
    if GATED:
        gate = weight_tile(wg, slot, col, unit, first, size, H, C, H, dtype)
        gate_bias = tl.load(bg + slot * H + first + unit, mask=first + unit < H, other=0.0)
    return into, bias, gate, gate_bias, weight_tile_rows(w2, slot, unit, col, first, H, size, H, C, dtype)


@triton.jit
def hidden_units(x, into, bias, gate, gate_bias, BIAS: tl.constexpr, GATED: tl.constexpr, PRECISION: tl.constexpr):
    """Pre-activations ``[BM, HB]`` of one block of hidden units: the value side and, if GATED, the gate side."""
    value = tl.dot(x, into, input_precision=PRECISION)
    if BIAS:
        value += bias[None, :]
    switch = value
    if GATED:
        switch = tl.dot(x, gate, input_precision=PRECISION) + gate_bias[None, :]
    return value, switch


@triton.jit
def block_delta(x, delta, into, bias, gate, gate_bias, out, BIAS: tl.constexpr, GATED: tl.constexpr, ACT: tl.constexpr,
                PRECISION: tl.constexpr):  # fmt: skip
    """Adds what one block of hidden units gives to δ."""
    value, switch = hidden_units(x, into, bias, gate, gate_bias, BIAS, GATED, PRECISION)
    hidden = tl.sigmoid(switch) * value if GATED else activate(value, ACT)
    return tl.dot(hidden.to(x.dtype), out, acc=delta, input_precision=PRECISION)


@triton.jit
def all_blocks_delta(x, delta, w1, b1, wg, bg, w2, slot, size, C: tl.constexpr, H: tl.constexpr, CP: tl.constexpr,
                     HB: tl.constexpr, BIAS: tl.constexpr, GATED: tl.constexpr, ACT: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """δ over all blocks of hidden units, their weights read again for every tile (hidden widths that do not fit at once)."""
    for first in range(0, H, HB):
        into, bias, gate, gate_bias, out = load_block(w1, b1, wg, bg, w2, slot, first, size, C, H, CP, HB, BIAS, GATED, x.dtype)
        delta = block_delta(x, delta, into, bias, gate, gate_bias, out, BIAS, GATED, ACT, PRECISION)
    return delta


@triton.jit
def roster_kernel(alpha, lesson, route, order, rank, seeds, BANKS: tl.constexpr, LESSONS: tl.constexpr, SB: tl.constexpr):
    """``order[bank]`` = (count, its active seeds ascending), ``rank[seed]`` = its place there, -1 for an inactive seed; one program."""
    for bank in tl.static_range(BANKS):
        count = 0
        for first in range(0, seeds, SB):
            seed = first + tl.arange(0, SB)
            known = seed < seeds
            active = tl.load(alpha + seed, mask=known, other=0.0) != 0.0
            if LESSONS:
                active = active | (tl.load(lesson + seed * 2 + 1, mask=known, other=0.0) != 0.0)
            owner = tl.load(route + seed * 3, mask=known, other=-1)
            mine = (active & (owner == bank)).to(tl.int32)
            place = count + tl.cumsum(mine, 0) - mine
            tl.store(order + bank * (seeds + 1) + 1 + place, seed, mask=mine != 0)
            tl.store(
                rank + seed, tl.where(mine != 0, place, -1), mask=known & ((mine != 0) | ((bank == 0) & ((owner < 0) | (active == 0))))
            )
            count += tl.sum(mine)
        tl.store(order + bank * (seeds + 1), count)


@triton.jit
def chunk_forward_kernel(
    x, y, alpha, route, order, w1, b1, wg, bg, w2, b2, partial, means, pivots,
    seeds, width, rows, inner, xo, xi, xc, yo, yi, yc, near_zero,
    C: tl.constexpr, H: tl.constexpr, CP: tl.constexpr, HB: tl.constexpr, BM: tl.constexpr, EVEN: tl.constexpr, FULL: tl.constexpr,
    AFFINE: tl.constexpr, BIAS: tl.constexpr, GATED: tl.constexpr, ACT: tl.constexpr,
    TELEMETRY: tl.constexpr, HALF: tl.constexpr, FLAT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: one active seed, every ``parts``-th block of BM rows (see ``assignment``).

    The weights stay in registers or shared memory over all blocks. ``partial[program]`` gets Σ(x-p)², the near-zero count and Σδ²,
    ``means[seed, row]`` the row's chunk mean minus the pivot p, the chunk's mean in row 0. FULL: no place of a tile is padding.
    """
    blocks = tl.cdiv(rows, BM)
    seed, part, parts = assignment(order, tl.program_id(0), tl.num_programs(0), blocks)
    if parts == 0:
        return
    strength = tl.load(alpha + seed).to(tl.float32)
    slot = tl.load(route + seed * 3 + 1).to(tl.int64)
    echo = tl.load(route + seed * 3 + 2) & 1
    start = chunk_start(seed, seeds, width, C, EVEN)
    size = chunk_size(start, seed, seeds, width, C, EVEN)
    col = tl.arange(0, CP)
    inside = col < size
    column = (start + col).to(tl.int64)
    shift = tl.zeros([CP], tl.float32)
    if BIAS:
        shift = tl.load(b2 + slot * C + col, mask=inside, other=0.0)
    if AFFINE:
        scale = tl.load(w1 + slot * C + col, mask=inside, other=0.0)
    elif H <= HB:
        into, bias, gate, gate_bias, out = load_block(w1, b1, wg, bg, w2, slot, 0, size, C, H, CP, HB, BIAS, GATED, x.dtype.element_ty)
    if TELEMETRY:
        pivot = tl.sum(tl.load(x + column * xc, mask=inside, other=0.0).to(tl.float32)) / size
        if part == 0:
            tl.store(pivots + seed, pivot)
    spread, close, power = tl.zeros([BM], tl.float32), tl.zeros([BM], tl.float32), tl.zeros([BM], tl.float32)
    for block in range(part, blocks, parts):
        row = block * BM + tl.arange(0, BM)
        reads = x + row_offsets(row, inner, xo, xi, FLAT)[:, None] + column[None, :] * xc
        mask = (row < rows)[:, None] & inside[None, :]
        tile = tl.load(reads) if FULL else tl.load(reads, mask=mask, other=0.0)
        wide = tile.to(tl.float32)
        if AFFINE:
            delta = wide * scale[None, :] + shift[None, :]
        else:
            delta = tl.zeros([BM, CP], tl.float32)
            if H <= HB:
                delta = block_delta(tile, delta, into, bias, gate, gate_bias, out, BIAS, GATED, ACT, PRECISION)
            else:
                delta = all_blocks_delta(tile, delta, w1, b1, wg, bg, w2, slot, size, C, H, CP, HB, BIAS, GATED, ACT, PRECISION)
            if BIAS:
                delta += shift[None, :]
        if echo != 0:
            delta -= wide
        result = wide + strength * delta
        square = delta * delta if FULL else tl.where(mask, delta * delta, 0.0)
        if HALF:
            square = tl.where(mask & (tl.abs(result) > 65504.0), float("inf"), square)
        power += tl.sum(square, 1)
        writes = y + row_offsets(row, inner, yo, yi, FLAT)[:, None] + column[None, :] * yc
        tl.store(writes, result.to(y.dtype.element_ty)) if FULL else tl.store(writes, result.to(y.dtype.element_ty), mask=mask)
        if TELEMETRY:
            centred = wide - pivot if FULL else tl.where(mask, wide - pivot, 0.0)
            near = tl.abs(wide) < near_zero if FULL else mask & (tl.abs(wide) < near_zero)
            spread += tl.sum(centred * centred, 1)
            close += tl.sum(tl.where(near, 1.0, 0.0), 1)
            tl.store(means + seed.to(tl.int64) * rows + row, tl.sum(centred, 1) / size, mask=row < rows)
    entry = partial + tl.program_id(0) * 3
    tl.store(entry + 2, tl.sum(power))
    if TELEMETRY:
        tl.store(entry, tl.sum(spread))
        tl.store(entry + 1, tl.sum(close))


@triton.jit
def settle_kernel(
    x, y, alpha, route, order, rank, partial, stats, live, power,
    seeds, width, rows, programs, tile_rows, bank, inner, xo, xi, xc, yo, yi, yc,
    BM: tl.constexpr, BC: tl.constexpr, C: tl.constexpr, EVEN: tl.constexpr, TELEMETRY: tl.constexpr, FLAT: tl.constexpr,
):  # fmt: skip
    """Containment: a branch whose Σδ² or α is not finite gets its chunk back unchanged and ``live`` = 0, else ``live`` = α.

    One program a seed and row share; without a flagged branch it reads a few numbers and leaves. Also brings the forward kernel's
    partial sums into ``stats[0]``. Run once a bank; the first bank's run settles the seeds that have none.
    """
    seed, share = tl.program_id(0), tl.program_id(1)
    place = tl.load(rank + seed)
    owner = tl.load(route + seed * 3)
    strength = tl.load(alpha + seed).to(tl.float32)
    if (place < 0) & (bank == 0) & (share == 0):
        tl.store(live + seed, 0.0)
        tl.store(power + seed, 0.0)
    if (place < 0) | (owner != bank):
        return
    count = tl.load(order)
    parts = tl.minimum(tl.maximum(tl.minimum(programs // count, tl.cdiv(rows, tile_rows)), 1), 128)
    part = tl.arange(0, 128)
    entry = partial + (part * count + place) * 3
    total = tl.sum(tl.load(entry + 2, mask=part < parts, other=0.0))
    fine = (tl.abs(total) < float("inf")) & (tl.abs(strength) < float("inf"))
    if share == 0:
        tl.store(live + seed, tl.where(fine, strength, 0.0))
        tl.store(power + seed, total)
        if TELEMETRY:
            tl.store(stats + seed * 3, tl.sum(tl.load(entry, mask=part < parts, other=0.0)))
            tl.store(stats + seed * 3 + 1, tl.sum(tl.load(entry + 1, mask=part < parts, other=0.0)))
    if fine == 0:
        start = chunk_start(seed, seeds, width, C, EVEN)
        size = chunk_size(start, seed, seeds, width, C, EVEN)
        for block in range(share, tl.cdiv(rows, BM), tl.num_programs(1)):
            row = block * BM + tl.arange(0, BM)
            for first in range(0, size, BC):
                col = first + tl.arange(0, BC)
                mask = (row < rows)[:, None] & (col < size)[None, :]
                column = (start + col).to(tl.int64)[None, :]
                tile = tl.load(x + row_offsets(row, inner, xo, xi, FLAT)[:, None] + column * xc, mask=mask)
                tl.store(y + row_offsets(row, inner, yo, yi, FLAT)[:, None] + column * yc, tile, mask=mask)
