"""Backward of the active chunks: ``dx = dy + (∂δ/∂x)ᵀ g`` and the branches' gradients, isolated objectives included."""

from __future__ import annotations

import triton
import triton.language as tl

from esper.kernels.activations import activate, activate_gradient
from esper.kernels.chunk_forward import all_blocks_delta, block_delta, hidden_units, load_block
from esper.kernels.triton_helpers import assignment, chunk_size, chunk_start, seed_parts, tile_pointers


@triton.jit
def hidden_slopes(x, into, gate, b1, bg, slot, first, H: tl.constexpr, BIAS: tl.constexpr, GATED: tl.constexpr, ACT: tl.constexpr,
                  PRECISION: tl.constexpr):  # fmt: skip
    """Hidden units of one block, and their derivatives by the value side's and the gate side's pre-activations."""
    value, switch = hidden_units(x, into, gate, b1, bg, slot, first, H, BIAS, GATED, PRECISION)
    if GATED:
        slope = tl.sigmoid(switch)
        hidden = slope * value
        switch_slope = hidden * (1.0 - slope)
    else:
        hidden = activate(value, ACT)
        slope = activate_gradient(value, ACT)
        switch_slope = slope
    return hidden, slope, switch_slope


@triton.jit
def chunk_backward_kernel(
    x, dy, dx, live, objective, route, active_seeds, w1, b1, wg, bg, w2, b2, dw1, db1, dwg, dbg, dw2, db2, residual,
    seeds, width, rows, inner, xo, xi, xc, go, gi, gc, do, di, dc,
    C: tl.constexpr, H: tl.constexpr, CP: tl.constexpr, HB: tl.constexpr, BM: tl.constexpr, EVEN: tl.constexpr, FULL: tl.constexpr,
    AFFINE: tl.constexpr, BIAS: tl.constexpr, GATED: tl.constexpr, ACT: tl.constexpr,
    OBJECTIVES: tl.constexpr, INPUT: tl.constexpr, KEPT: tl.constexpr, FLAT: tl.constexpr,
    XR: tl.constexpr, GR: tl.constexpr, DR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: one active seed, one block of HB hidden units, every ``parts``-th block of BM rows.

    Parameter gradients are partial sums ``[program, …]`` that ``sum_gradients_kernel`` adds up. INPUT also writes ``dx``,
    possible when one block holds all hidden units. KEPT: ``x`` is ``[capacity, rows, C]``, as the forward kernel kept it. An objective
    ``(scale, weight)`` with weight ≠ 0 learns ``weight·½‖δ + scale·dy‖²`` instead, and lets ``dy`` pass.
    """
    pid, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * HB
    blocks = tl.cdiv(rows, BM)
    seed, part, parts = assignment(active_seeds, tl.program_id(0), tl.num_programs(0), blocks)
    if parts == 0:
        return
    strength = tl.load(live + seed)
    scale, weight = 0.0, 0.0
    if OBJECTIVES:
        scale, weight = tl.load(objective + seed * 2), tl.load(objective + seed * 2 + 1)
    slot = tl.load(route + seed * 3 + 1).to(tl.int64)
    subtract = tl.load(route + seed * 3 + 2) & 1
    start = chunk_start(seed, seeds, width, C, EVEN)
    size = chunk_size(start, seed, seeds, width, C, EVEN)
    col, unit = tl.arange(0, CP), tl.arange(0, HB)
    inside = col < size
    shift = tl.zeros([CP], tl.float32)
    if BIAS:
        shift = tl.load(b2 + slot * C + col, mask=inside, other=0.0)
    # Sums over rows are products with ones on the matrix units: no exchange between warps in the loop.
    ones = tl.full([16, BM], 1.0, tl.float32).to(x.dtype.element_ty)
    g_shift = tl.zeros([16, CP], tl.float32)
    if AFFINE:
        factor = tl.load(w1 + slot * C + col, mask=inside, other=0.0)
        g_factor, g_shift = tl.zeros([CP], tl.float32), tl.zeros([CP], tl.float32)
    else:
        dtype = x.dtype.element_ty
        into, gate, out = load_block(w1, wg, w2, slot, first, size, C, H, CP, HB, GATED, dtype)
        # Without objectives α multiplies the weights once instead of dy in every tile.
        back = out if OBJECTIVES else (out * strength).to(dtype)
        g_into, g_out, g_bias = tl.zeros([CP, HB], tl.float32), tl.zeros([HB, CP], tl.float32), tl.zeros([16, HB], tl.float32)
        if GATED:
            g_gate, g_gate_bias = tl.zeros([CP, HB], tl.float32), tl.zeros([16, HB], tl.float32)
    missed = tl.zeros([BM], tl.float32)
    for block in range(part, blocks, parts):
        row = block * BM + tl.arange(0, BM)
        mask = (row < rows)[:, None] & inside[None, :]
        if KEPT:
            reads = tile_pointers(x + slot * rows * C, block, start * 0, col, rows, 0, C, 1, BM, C, True)
        else:
            reads = tile_pointers(x, block, start, col, inner, xo, xi, xc, BM, XR, FLAT)
        arrives = tile_pointers(dy, block, start, col, inner, go, gi, gc, BM, GR, FLAT)
        tile = tl.load(reads) if FULL else tl.load(reads, mask=mask, other=0.0)
        gb = (tl.load(arrives) if FULL else tl.load(arrives, mask=mask, other=0.0)).to(tile.dtype)
        arriving = gb.to(tl.float32)
        g = arriving
        if OBJECTIVES:
            g = strength * arriving
            if weight != 0.0:
                wide = tile.to(tl.float32)
                if AFFINE:
                    delta = wide * factor[None, :]
                else:
                    delta = tl.zeros([BM, CP], tl.float32)
                    if H <= HB:
                        delta = block_delta(tile, delta, into, gate, out, b1, bg, slot, 0, H, BIAS, GATED, ACT, PRECISION)
                    else:
                        delta = all_blocks_delta(tile, delta, w1, b1, wg, bg, w2, slot, size, C, H, CP, HB, BIAS, GATED, ACT, PRECISION)
                delta = tl.where(mask, delta + shift[None, :] - wide * subtract + scale * arriving, 0.0)
                missed += tl.sum(delta * delta, 1)
                g = weight * delta
            gb = g.to(tile.dtype)
        if AFFINE:
            g_shift += tl.sum(g, 0)
            g_factor += tl.sum(g * tile.to(tl.float32), 0)
            d_tile = (g if OBJECTIVES else strength * g) * factor[None, :]
        else:
            # In this order the fewest tiles are alive at once.
            hidden, slope, switch_slope = hidden_slopes(tile, into, gate, b1, bg, slot, first, H, BIAS, GATED, ACT, PRECISION)
            g_out = tl.dot(tl.trans(hidden.to(tile.dtype)), gb, acc=g_out, input_precision=PRECISION)
            d_hidden = tl.dot(gb, tl.trans(back), input_precision=PRECISION)
            d_value = (d_hidden * slope).to(tile.dtype)
            g_into = tl.dot(tl.trans(tile), d_value, acc=g_into, input_precision=PRECISION)
            if BIAS:
                g_shift = tl.dot(ones, gb, acc=g_shift, input_precision=PRECISION)
                g_bias = tl.dot(ones, d_value, acc=g_bias, input_precision=PRECISION)
            if GATED:
                d_switch = (d_hidden * switch_slope).to(tile.dtype)
                g_gate = tl.dot(tl.trans(tile), d_switch, acc=g_gate, input_precision=PRECISION)
                g_gate_bias = tl.dot(ones, d_switch, acc=g_gate_bias, input_precision=PRECISION)
            if INPUT:
                d_tile = tl.dot(d_value, tl.trans(into), input_precision=PRECISION)
                if GATED:
                    d_tile = tl.dot(d_switch, tl.trans(gate), acc=d_tile, input_precision=PRECISION)
        if INPUT:
            if subtract != 0:
                d_tile -= g if OBJECTIVES else strength * g
            total = arriving + (tl.where(weight == 0.0, d_tile, 0.0) if OBJECTIVES else d_tile)  # never 0·NaN
            writes = tile_pointers(dx, block, start, col, inner, do, di, dc, BM, DR, FLAT)
            tl.store(writes, total.to(dx.dtype.element_ty)) if FULL else tl.store(writes, total.to(dx.dtype.element_ty), mask=mask)
    rest = 1.0 if OBJECTIVES else strength
    if not AFFINE:
        g_out *= rest
        g_shift, g_bias = tl.sum(g_shift, 0) / 16, tl.sum(g_bias, 0) / 16
        if GATED:
            g_gate_bias = tl.sum(g_gate_bias, 0) / 16
    else:
        g_factor *= rest
    g_shift *= rest
    if BIAS:  # decided when compiling, the next one when running
        if first == 0:
            tl.store(db2 + pid * C + col, g_shift, mask=col < C)
    if AFFINE:
        tl.store(dw1 + pid * C + col, g_factor, mask=col < C)
    else:
        known, real = first + unit < H, col < C
        tl.store(dw1 + pid * C * H + col[:, None] * H + (first + unit)[None, :], g_into, mask=real[:, None] & known[None, :])
        tl.store(dw2 + pid * C * H + (first + unit)[:, None] * C + col[None, :], g_out, mask=known[:, None] & real[None, :])
        if BIAS:
            tl.store(db1 + pid * H + first + unit, g_bias, mask=known)
        if GATED:
            tl.store(dwg + pid * C * H + col[:, None] * H + (first + unit)[None, :], g_gate, mask=real[:, None] & known[None, :])
            tl.store(dbg + pid * H + first + unit, g_gate_bias, mask=known)
    if OBJECTIVES:  # as above
        if first == 0:
            tl.store(residual + pid, tl.sum(missed))


@triton.jit
def chunk_input_gradient_kernel(
    x, dy, dx, live, objective, route, active_seeds, w1, b1, wg, bg, w2,
    seeds, width, rows, inner, xo, xi, xc, go, gi, gc, do, di, dc,
    C: tl.constexpr, H: tl.constexpr, CP: tl.constexpr, HB: tl.constexpr, BM: tl.constexpr, EVEN: tl.constexpr, FULL: tl.constexpr,
    BIAS: tl.constexpr, GATED: tl.constexpr, ACT: tl.constexpr, OBJECTIVES: tl.constexpr, KEPT: tl.constexpr, FLAT: tl.constexpr,
    XR: tl.constexpr, GR: tl.constexpr, DR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``dx`` alone, block after block of hidden units, where one block cannot hold them all."""
    blocks = tl.cdiv(rows, BM)
    seed, part, parts = assignment(active_seeds, tl.program_id(0), tl.num_programs(0), blocks)
    if parts == 0:
        return
    strength = tl.load(live + seed)
    weight = 0.0
    if OBJECTIVES:
        weight = tl.load(objective + seed * 2 + 1)
    slot = tl.load(route + seed * 3 + 1).to(tl.int64)
    subtract = (tl.load(route + seed * 3 + 2) & 1).to(tl.float32)
    through = tl.where(weight == 0.0, strength, 0.0)
    start = chunk_start(seed, seeds, width, C, EVEN)
    size = chunk_size(start, seed, seeds, width, C, EVEN)
    col = tl.arange(0, CP)
    if H <= HB:
        into, gate, out = load_block(w1, wg, w2, slot, 0, size, C, H, CP, HB, GATED, x.dtype.element_ty)
        back = (out * through).to(x.dtype.element_ty)
    for block in range(part, blocks, parts):
        row = block * BM + tl.arange(0, BM)
        mask = (row < rows)[:, None] & (col < size)[None, :]
        if KEPT:
            reads = tile_pointers(x + slot * rows * C, block, start * 0, col, rows, 0, C, 1, BM, C, True)
        else:
            reads = tile_pointers(x, block, start, col, inner, xo, xi, xc, BM, XR, FLAT)
        arrives = tile_pointers(dy, block, start, col, inner, go, gi, gc, BM, GR, FLAT)
        tile = tl.load(reads) if FULL else tl.load(reads, mask=mask, other=0.0)
        arriving = (tl.load(arrives) if FULL else tl.load(arrives, mask=mask, other=0.0)).to(tile.dtype)
        d_tile = tl.zeros([BM, CP], tl.float32)
        if H <= HB:
            d_tile = block_input_gradient(tile, arriving, d_tile, into, gate, back, b1, bg, slot, 0, H, BIAS, GATED, ACT, PRECISION)
        else:
            g = (through * arriving.to(tl.float32)).to(tile.dtype)
            for first in range(0, H, HB):
                into, gate, out = load_block(w1, wg, w2, slot, first, size, C, H, CP, HB, GATED, tile.dtype)
                d_tile = block_input_gradient(tile, g, d_tile, into, gate, out, b1, bg, slot, first, H, BIAS, GATED, ACT, PRECISION)
        total = arriving.to(tl.float32) * (1.0 - subtract * through) + d_tile
        writes = tile_pointers(dx, block, start, col, inner, do, di, dc, BM, DR, FLAT)
        tl.store(writes, total.to(dx.dtype.element_ty)) if FULL else tl.store(writes, total.to(dx.dtype.element_ty), mask=mask)


@triton.jit
def block_input_gradient(tile, g, d_tile, into, gate, back, b1, bg, slot, first, H: tl.constexpr, BIAS: tl.constexpr,
                         GATED: tl.constexpr, ACT: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Add the part of one block of hidden units to ``dx``; α is in its out weights ``back`` or in ``g``."""
    _, slope, switch_slope = hidden_slopes(tile, into, gate, b1, bg, slot, first, H, BIAS, GATED, ACT, PRECISION)
    d_hidden = tl.dot(g, tl.trans(back), input_precision=PRECISION)
    d_tile = tl.dot((d_hidden * slope).to(tile.dtype), tl.trans(into), acc=d_tile, input_precision=PRECISION)
    if GATED:
        d_tile = tl.dot((d_hidden * switch_slope).to(tile.dtype), tl.trans(gate), acc=d_tile, input_precision=PRECISION)
    return d_tile


@triton.jit
def add_parts(partial, target, into, element, numel, place, count, parts, BN: tl.constexpr):
    """``target[into]`` at ``element`` = sum of the partial sums of a seed's programs, in a fixed order; 0 without a program."""
    total = tl.zeros([BN], tl.float32)
    for part in range(0, parts):
        total += tl.load(partial + (part * count + place).to(tl.int64) * numel + element, mask=element < numel, other=0.0)
    tl.store(target + into * numel + element, total, mask=element < numel)


@triton.jit
def add_slot(partial, target, into, block, N: tl.constexpr, place, count, parts, BN: tl.constexpr):
    """:func:`add_parts` of block ``block`` of a tensor of N elements a slot, if it has such a block."""
    if N > 0:
        if (block >= 0) & (block < (N + BN - 1) // BN):
            add_parts(partial, target, into, block * BN + tl.arange(0, BN), N, place, count, parts, BN)


@triton.jit
def sum_gradients_kernel(
    p0, t0, p1, t1, p2, t2, p3, t3, p4, t4, p5, t5, route, active_seeds, rank, seeds, rows, programs, bank,
    N0: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, N3: tl.constexpr, N4: tl.constexpr, N5: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, SB: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Gradients of all tensors of a bank, ``t[slot]`` from ``p[program]`` with N elements each (0: no such tensor).

    One program a slot and BN elements, counted through all tensors. A slot without an active seed that learns gets zeros.
    """
    slot, block = tl.program_id(0), tl.program_id(1)
    holder = -1
    for first in range(0, seeds, SB):
        seed = first + tl.arange(0, SB)
        known = seed < seeds
        here = (tl.load(route + seed * 3, mask=known, other=-1) == bank) & (tl.load(route + seed * 3 + 1, mask=known, other=-1) == slot)
        here = here & ((tl.load(route + seed * 3 + 2, mask=known, other=0) & 2) == 0)
        place = tl.load(rank + seed, mask=known, other=-1)
        holder = tl.maximum(holder, tl.max(tl.where(here, place, -1)))
    count, most = seed_parts(active_seeds, rows, programs, BM, PACKED)
    parts, into = tl.where(holder < 0, 0, most), slot.to(tl.int64)
    # Where each tensor's blocks begin, without values from calls: a tracer takes what feeds an address for written.
    B1: tl.constexpr = (N0 + BN - 1) // BN
    B2: tl.constexpr = B1 + (N1 + BN - 1) // BN
    B3: tl.constexpr = B2 + (N2 + BN - 1) // BN
    B4: tl.constexpr = B3 + (N3 + BN - 1) // BN
    B5: tl.constexpr = B4 + (N4 + BN - 1) // BN
    add_slot(p0, t0, into, block, N0, holder, count, parts, BN)
    add_slot(p1, t1, into, block - B1, N1, holder, count, parts, BN)
    add_slot(p2, t2, into, block - B2, N2, holder, count, parts, BN)
    add_slot(p3, t3, into, block - B3, N3, holder, count, parts, BN)
    add_slot(p4, t4, into, block - B4, N4, holder, count, parts, BN)
    add_slot(p5, t5, into, block - B5, N5, holder, count, parts, BN)


@triton.jit
def sum_residuals_kernel(partial, residual, route, active_seeds, rank, rows, programs, bank, BM: tl.constexpr):
    """``residual[seed]`` = sum of its ``partial[program]``; one program a seed."""
    seed = tl.program_id(0)
    place = tl.load(rank + seed)
    if (place < 0) | (tl.load(route + seed * 3) != bank):
        return
    count, parts = seed_parts(active_seeds, rows, programs, BM, 1)
    add_parts(partial, residual, seed, tl.arange(0, 1), 1, place, count, parts, 1)
