"""Narrow chunks: the active chunks of several seeds side by side in one tile, forward and backward.

A product needs tiles of 16 features, of which a chunk of three would use three. Here G seeds share a tile, each with W of its columns
and, of the hidden units, a block of its own. Their matrices stand on the diagonal of one matrix, and what lies beside it is zero.

Zero times infinity is not zero. Therefore values that are not finite are left out of every product across seeds, and noted for the seed
that they belong to, so that no branch is felt by another.
"""

from __future__ import annotations

import triton
import triton.language as tl

from esper.kernels.activations import activate, activate_gradient
from esper.kernels.triton_helpers import chunk_size, chunk_start, tile_pointers


@triton.jit
def packed_assignment(active_seeds, pid, programs, blocks, G: tl.constexpr):
    """As ``assignment``, for groups of G active seeds: (active seeds, group, part, parts)."""
    count = tl.load(active_seeds)
    groups = tl.maximum(tl.cdiv(count, G), 1)
    parts = tl.minimum(tl.maximum(tl.minimum(programs // groups, blocks), 1), 128)
    return count, pid % groups, pid // groups, tl.where((count > 0) & (pid < groups * parts), parts, 0)


@triton.jit
def packed_columns(active_seeds, route, group, count, seeds, width, C: tl.constexpr, EVEN: tl.constexpr, G: tl.constexpr, W: tl.constexpr):
    """Of every column: its seed, place in the active list, slot, whether δ = net(x) − x, feature, place in the chunk, whether it exists."""
    column = tl.arange(0, G * W)
    member, place = group * G + column // W, column % W
    known = member < count
    seed = tl.load(active_seeds + 1 + member, mask=known, other=0)
    slot = tl.load(route + seed * 3 + 1, mask=known, other=0).to(tl.int64)
    bits = tl.load(route + seed * 3 + 2, mask=known, other=0)
    start = chunk_start(seed, seeds, width, C, EVEN)
    inside = known & (place < chunk_size(start, seed, seeds, width, C, EVEN))
    return seed, member, slot, bits & 1, start + place, place, inside


@triton.jit
def packed_units(active_seeds, route, group, count, H: tl.constexpr, HB: tl.constexpr, G: tl.constexpr):
    """Of every hidden unit of a tile: its seed's place in the active list, its slot, its number, and whether there is such a unit."""
    unit = tl.arange(0, G * HB)
    member, number = group * G + unit // HB, unit % HB
    known = (member < count) & (number < H)
    seed = tl.load(active_seeds + 1 + member, mask=known, other=0)
    return member, tl.load(route + seed * 3 + 1, mask=known, other=0).to(tl.int64), number, known


@triton.jit
def packed_weights(w1, w2, slot, number, known, place, inside, C: tl.constexpr, H: tl.constexpr, HB: tl.constexpr, G: tl.constexpr,
                   W: tl.constexpr, dtype: tl.constexpr):  # fmt: skip
    """The matrices of G seeds on the diagonals of ``[G·W, G·HB]`` and ``[G·HB, G·W]``."""
    column, unit = tl.arange(0, G * W), tl.arange(0, G * HB)
    own = ((column // W)[:, None] == (unit // HB)[None, :]) & inside[:, None] & known[None, :]
    into = tl.load(w1 + (slot * (C * H) + number)[None, :] + (place * H)[:, None], mask=own, other=0.0).to(dtype)
    back = ((unit // HB)[:, None] == (column // W)[None, :]) & known[:, None] & inside[None, :]
    out = tl.load(w2 + (slot * (C * H) + number * C)[:, None] + place[None, :], mask=back, other=0.0).to(dtype)
    return into, out


@triton.jit
def only_finite(tile):
    """The tile with zeros for what is not finite."""
    return tl.where(tl.abs(tile.to(tl.float32)) < float("inf"), tile, tl.zeros_like(tile))


@triton.jit
def packed_forward_kernel(
    x, y, kept, alpha, route, active_seeds, w1, b1, w2, b2, partial,
    seeds, width, rows, inner, xo, xi, xc, yo, yi, yc,
    C: tl.constexpr, H: tl.constexpr, HB: tl.constexpr, G: tl.constexpr, W: tl.constexpr, BM: tl.constexpr, EVEN: tl.constexpr,
    WHOLE: tl.constexpr, BIAS: tl.constexpr, ACT: tl.constexpr, HALF: tl.constexpr, KEEPS: tl.constexpr, FLAT: tl.constexpr,
    XR: tl.constexpr, YR: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: G active seeds, every ``parts``-th block of BM rows; otherwise as ``chunk_forward_kernel`` without telemetry.

    WHOLE: all blocks are whole.
    """
    blocks = tl.cdiv(rows, BM)
    count, group, part, parts = packed_assignment(active_seeds, tl.program_id(0), tl.num_programs(0), blocks, G)
    if parts == 0:
        return
    seed, _, slot, subtract, feature, place, inside = packed_columns(active_seeds, route, group, count, seeds, width, C, EVEN, G, W)
    _, unit_slot, number, known = packed_units(active_seeds, route, group, count, H, HB, G)
    into, out = packed_weights(w1, w2, unit_slot, number, known, place, inside, C, H, HB, G, W, x.dtype.element_ty)
    strength = tl.load(alpha + seed, mask=inside, other=0.0).to(tl.float32)
    shift, unit_shift = tl.zeros([G * W], tl.float32), tl.zeros([G * HB], tl.float32)
    if BIAS:
        shift = tl.load(b2 + slot * C + place, mask=inside, other=0.0).to(tl.float32)
        unit_shift = tl.load(b1 + unit_slot * H + number, mask=known, other=0.0).to(tl.float32)
    ones = tl.full([16, BM], 1.0, tl.float32).to(x.dtype.element_ty)
    power, seen = tl.zeros([BM, G * W], tl.float32), tl.zeros([16, G * HB], tl.float32)
    for block in tl.range(part, blocks, parts, num_stages=STAGES):
        row = block * BM + tl.arange(0, BM)
        mask = tl.broadcast_to(inside[None, :], (BM, G * W)) if WHOLE else (row < rows)[:, None] & inside[None, :]
        tile = tl.load(tile_pointers(x, block, 0, feature, inner, xo, xi, xc, BM, XR, FLAT), mask=mask, other=0.0)
        if KEEPS:
            tl.store(kept + (slot * rows * C + place)[None, :] + (row.to(tl.int64) * C)[:, None], tile, mask=mask)
        wide = tile.to(tl.float32)
        hidden = tl.dot(only_finite(tile), into, input_precision=PRECISION)
        if BIAS:
            hidden += unit_shift[None, :]
        units = activate(hidden, ACT).to(tile.dtype)
        seen = tl.dot(ones, units, acc=seen, input_precision=PRECISION)
        delta = tl.dot(only_finite(units), out, input_precision=PRECISION)
        if BIAS:
            delta += shift[None, :]
        delta = tl.where(subtract[None, :] != 0, delta - wide, delta)
        result = wide + strength[None, :] * delta
        square = tl.where(mask, delta * delta, 0.0)
        square = tl.where(tl.abs(wide) < float("inf"), square, float("inf"))
        if HALF:
            square = tl.where(mask & (tl.abs(result) > 65504.0), float("inf"), square)
        power += square
        tl.store(tile_pointers(y, block, 0, feature, inner, yo, yi, yc, BM, YR, FLAT), result.to(y.dtype.element_ty), mask=mask)
    unsound = tl.where(tl.abs(tl.sum(seen, 0)) < float("inf"), 0.0, 1.0)
    unsound = tl.sum(tl.reshape(unsound, [G, HB]), 1)
    total = tl.sum(tl.reshape(tl.sum(power, 0), [G, W]), 1)
    mine = group * G + tl.arange(0, G)
    tl.store(partial + (part * count + mine) * 3 + 2, tl.where(unsound > 0.0, float("inf"), total), mask=mine < count)


@triton.jit
def packed_backward_kernel(
    x, dy, dx, live, route, active_seeds, w1, b1, w2, b2, dw1, db1, dw2, db2,
    seeds, width, rows, inner, xo, xi, xc, go, gi, gc, do, di, dc,
    C: tl.constexpr, H: tl.constexpr, HB: tl.constexpr, G: tl.constexpr, W: tl.constexpr, BM: tl.constexpr, EVEN: tl.constexpr,
    WHOLE: tl.constexpr, BIAS: tl.constexpr, ACT: tl.constexpr, KEPT: tl.constexpr, FLAT: tl.constexpr,
    XR: tl.constexpr, GR: tl.constexpr, DR: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: G active seeds, every ``parts``-th block of BM rows; otherwise as ``chunk_backward_kernel`` without objectives.

    If a gradient that arrives is not finite, the gradient of its branch is not finite either, and the branch is not moved by it.
    """
    blocks = tl.cdiv(rows, BM)
    count, group, part, parts = packed_assignment(active_seeds, tl.program_id(0), tl.num_programs(0), blocks, G)
    if parts == 0:
        return
    seed, member, slot, subtract, feature, place, inside = packed_columns(active_seeds, route, group, count, seeds, width, C, EVEN, G, W)
    unit_member, unit_slot, number, known = packed_units(active_seeds, route, group, count, H, HB, G)
    into, out = packed_weights(w1, w2, unit_slot, number, known, place, inside, C, H, HB, G, W, dy.dtype.element_ty)
    strength = tl.load(live + seed, mask=inside, other=0.0).to(tl.float32)
    unit_shift = tl.zeros([G * HB], tl.float32)
    if BIAS:
        unit_shift = tl.load(b1 + unit_slot * H + number, mask=known, other=0.0).to(tl.float32)
    through = (out * strength[None, :]).to(dy.dtype.element_ty)
    ones = tl.full([16, BM], 1.0, tl.float32).to(dy.dtype.element_ty)
    g_into, g_out = tl.zeros([G * W, G * HB], tl.float32), tl.zeros([G * HB, G * W], tl.float32)
    g_shift, g_unit_shift = tl.zeros([16, G * W], tl.float32), tl.zeros([16, G * HB], tl.float32)
    for block in tl.range(part, blocks, parts, num_stages=STAGES):
        row = block * BM + tl.arange(0, BM)
        mask = tl.broadcast_to(inside[None, :], (BM, G * W)) if WHOLE else (row < rows)[:, None] & inside[None, :]
        if KEPT:
            reads = x + (slot * rows * C + place)[None, :] + (row.to(tl.int64) * C)[:, None]
        else:
            reads = tile_pointers(x, block, 0, feature, inner, xo, xi, xc, BM, XR, FLAT)
        tile = tl.load(reads, mask=mask, other=0.0)
        arrived = tl.load(tile_pointers(dy, block, 0, feature, inner, go, gi, gc, BM, GR, FLAT), mask=mask, other=0.0)
        g = only_finite(arrived)
        hidden = tl.dot(tile, into, input_precision=PRECISION)
        if BIAS:
            hidden += unit_shift[None, :]
        g_out = tl.dot(tl.trans(activate(hidden, ACT).to(tile.dtype)), g, acc=g_out, input_precision=PRECISION)
        d_hidden = tl.dot(g, tl.trans(through), input_precision=PRECISION)
        d_units = (d_hidden * activate_gradient(hidden, ACT)).to(tile.dtype)
        g_shift = tl.dot(ones, arrived, acc=g_shift, input_precision=PRECISION)
        g_unit_shift = tl.dot(ones, d_units, acc=g_unit_shift, input_precision=PRECISION)
        d_units = only_finite(d_units)
        g_into = tl.dot(tl.trans(tile), d_units, acc=g_into, input_precision=PRECISION)
        d_tile = tl.dot(d_units, tl.trans(into), input_precision=PRECISION)
        arriving = arrived.to(tl.float32)
        d_tile = tl.where(subtract[None, :] != 0, d_tile - strength[None, :] * arriving, d_tile)
        writes = tile_pointers(dx, block, 0, feature, inner, do, di, dc, BM, DR, FLAT)
        tl.store(writes, (arriving + d_tile).to(dx.dtype.element_ty), mask=mask)
    total, unit_total = tl.sum(g_shift, 0) / 16 * strength, tl.sum(g_unit_shift, 0) / 16
    g_into, g_out = g_into + (unit_total * 0.0)[None, :], g_out * strength[None, :] + (total * 0.0)[None, :]
    column, unit = tl.arange(0, G * W), tl.arange(0, G * HB)
    entry, unit_entry = (part * count + member).to(tl.int64), (part * count + unit_member).to(tl.int64)
    real = (member < count) & (place < C)
    own = ((column // W)[:, None] == (unit // HB)[None, :]) & real[:, None] & known[None, :]
    tl.store(dw1 + (unit_entry * (C * H) + number)[None, :] + (place * H)[:, None], g_into, mask=own)
    back = ((unit // HB)[:, None] == (column // W)[None, :]) & known[:, None] & real[None, :]
    tl.store(dw2 + (unit_entry * (C * H) + number * C)[:, None] + place[None, :], g_out, mask=back)
    if BIAS:
        tl.store(db1 + unit_entry * H + number, unit_total, mask=known)
        tl.store(db2 + entry * C + place, total, mask=real)
