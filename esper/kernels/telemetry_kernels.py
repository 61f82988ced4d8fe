"""Telemetry kernels: a site read once by whole rows, and the second, deterministic reductions."""

from __future__ import annotations

import triton
import triton.language as tl

from esper.kernels.active_list import write_active_list
from esper.kernels.triton_helpers import chunk_size, chunk_start, few_active, row_offsets, tile_pointers


@triton.jit
def whole_rows_kernel(
    x, y, alpha, route, active_seeds, rank, means, moments, totals, stats, pivots,
    seeds, width, rows, parts, inner, xo, xi, xc, yo, yi, yc, near_zero,
    BM: tl.constexpr, SP: tl.constexpr, CP: tl.constexpr, C: tl.constexpr, EVEN: tl.constexpr, FULL: tl.constexpr,
    COPY: tl.constexpr, FLAT: tl.constexpr, STAGES: tl.constexpr, BANKS: tl.constexpr, RB: tl.constexpr,
):  # fmt: skip
    """One program: every ``parts``-th block of BM whole rows, so that a row's total is known when its chunks are.

    Everything is shifted by pivots p, the chunk's mean in row 0, which keeps float32 sums of squares sound. Outputs:
    ``moments[part, seed]`` = Σm, Σm², Σm·T, with m a row's chunk mean and T its total; ``totals[part]`` = ΣT, ΣT²;
    ``stats[part, seed]`` = Σ(x-p)², near-zero count. FULL: no place of the tile is padding.

    COPY also brings the chunks without an active branch to ``y``, and one more program writes the active list. If more than a few seeds are
    active (see ``few_active``), theirs are not even read: the rest leaves ``means[seed, row]`` instead of moments, as the forward
    kernel does for the active ones.
    """
    part = tl.program_id(0)
    if COPY:
        if part == parts:
            write_active_list(alpha, alpha, route, active_seeds, rank, seeds, BANKS, False, RB)
            return
    seed, place = tl.arange(0, SP), tl.arange(0, CP)
    start = chunk_start(seed, seeds, width, C, EVEN)
    size = chunk_size(start, seed, seeds, width, C, EVEN)
    mine = seed < seeds
    few = True
    passes = mine
    if COPY:
        owner = tl.load(route + seed * 3, mask=mine, other=-1)
        active = mine & (owner >= 0) & (tl.load(alpha + seed, mask=mine, other=0.0) != 0.0)
        count = tl.sum(active.to(tl.int32))
        few = count * 4 <= seeds
        passes = mine & (active == 0)
        mine = mine & (passes | few)
        if (few == 0) & (count == seeds):
            return
    inside = mine[:, None] & (place[None, :] < size[:, None])
    column = start[:, None] + place[None, :]
    columns = column.to(tl.int64) * xc
    features = tl.where(seed < seeds, size, 1).to(tl.float32)
    pivot = tl.sum(tl.load(x + columns, mask=inside, other=0.0).to(tl.float32), 1) / features
    spread, close = tl.zeros([SP, CP], tl.float32), tl.zeros([SP, CP], tl.float32)
    first, second, mixed = tl.zeros([SP], tl.float32), tl.zeros([SP], tl.float32), tl.zeros([SP], tl.float32)
    total, squared = tl.zeros([BM], tl.float32), tl.zeros([BM], tl.float32)
    for block in tl.range(part, tl.cdiv(rows, BM), parts, num_stages=STAGES):
        row = block * BM + tl.arange(0, BM)
        offset = row_offsets(row, inner, xo, xi, FLAT)[:, None, None] + columns[None, :, :]
        mask = (row < rows)[:, None, None] & inside[None, :, :]
        if FULL:
            mask = tl.broadcast_to(mine[None, :, None], (BM, SP, CP))
        if FULL and not COPY:
            tile = tl.load(x + offset)
        else:
            tile = tl.load(x + offset, mask=mask, other=0.0)
        wide = tile.to(tl.float32)
        if FULL:  # the sums of a seed that is not read are not stored
            centred = wide - pivot[None, :, None]
            near = tl.where(tl.abs(wide) < near_zero, 1.0, 0.0)
        else:
            centred = tl.where(mask, wide - pivot[None, :, None], 0.0)
            near = tl.where(mask & (tl.abs(wide) < near_zero), 1.0, 0.0)
        spread += tl.sum(centred * centred, 0)
        close += tl.sum(near, 0)
        sums = tl.sum(centred, 2)
        whole = tl.sum(sums, 1)
        mean = sums / features[None, :]
        first += tl.sum(mean, 0)
        second += tl.sum(mean * mean, 0)
        mixed += tl.sum(mean * whole[:, None], 0)
        total += whole
        squared += whole * whole
        if COPY:
            writes = row_offsets(row, inner, yo, yi, FLAT)[:, None, None] + (column.to(tl.int64) * yc)[None, :, :]
            tl.store(y + writes, tile, mask=mask & passes[None, :, None])
            if few == 0:
                where = seed.to(tl.int64)[None, :] * rows + row[:, None]
                tl.store(means + where, mean, mask=(row < rows)[:, None] & mine[None, :])
    if part == 0:
        tl.store(pivots + seed, pivot, mask=mine)
    entry = (part * seeds + seed).to(tl.int64) * 3
    tl.store(stats + entry, tl.sum(spread, 1), mask=mine)
    tl.store(stats + entry + 1, tl.sum(close, 1), mask=mine)
    if few:
        tl.store(moments + entry, first, mask=mine)
        tl.store(moments + entry + 1, second, mask=mine)
        tl.store(moments + entry + 2, mixed, mask=mine)
        tl.store(totals + part * 2, tl.sum(total))
        tl.store(totals + part * 2 + 1, tl.sum(squared))


@triton.jit
def moments_kernel(
    means, rank, moments, totals, seeds, width, rows,
    C: tl.constexpr, EVEN: tl.constexpr, WHOLE: tl.constexpr, BM: tl.constexpr, SB: tl.constexpr, ONCE: tl.constexpr,
):  # fmt: skip
    """From ``means[seed, row]``: row totals ``T = Σ size·m`` of one block of BM rows, then every seed's Σm, Σm² and Σm·T in it.

    ONCE: SB holds all seeds, and nothing is read twice. Nothing to do where ``whole_rows_kernel`` has done it.
    """
    if WHOLE:
        if few_active(rank, seeds, WHOLE):
            return
    block = tl.program_id(0)
    row = block * BM + tl.arange(0, BM)
    known = row < rows
    total = tl.zeros([BM], tl.float32)
    for first in range(0, seeds, SB):
        seed = first + tl.arange(0, SB)
        size = chunk_size(chunk_start(seed, seeds, width, C, EVEN), seed, seeds, width, C, EVEN)
        mask = (seed < seeds)[:, None] & known[None, :]
        tile = tl.load(means + seed.to(tl.int64)[:, None] * rows + row[None, :], mask=mask, other=0.0)
        total += tl.sum(tile * size[:, None], 0)
        if ONCE:
            block_moments(tile, total, moments, block, seed, seeds)
    tl.store(totals + block * 2, tl.sum(total))
    tl.store(totals + block * 2 + 1, tl.sum(total * total))
    if not ONCE:
        for first in range(0, seeds, SB):
            seed = first + tl.arange(0, SB)
            mask = (seed < seeds)[:, None] & known[None, :]
            tile = tl.load(means + seed.to(tl.int64)[:, None] * rows + row[None, :], mask=mask, other=0.0)
            block_moments(tile, total, moments, block, seed, seeds)


@triton.jit
def block_moments(tile, total, moments, block, seed, seeds):
    """Σm, Σm² and Σm·T over the rows of one block, for the seeds of ``tile [SB, BM]``."""
    entry, mine = moments + (block * seeds + seed).to(tl.int64) * 3, seed < seeds
    tl.store(entry, tl.sum(tile, 1), mask=mine)
    tl.store(entry + 1, tl.sum(tile * tile, 1), mask=mine)
    tl.store(entry + 2, tl.sum(tile * total[None, :], 1), mask=mine)


@triton.jit
def finish_kernel(
    rank, pivots, moments, totals, stats, health,
    seeds, width, rows, blocks, parts,
    C: tl.constexpr, EVEN: tl.constexpr, WHOLE: tl.constexpr, CHOICE: tl.constexpr, SB: tl.constexpr, PB: tl.constexpr,
):  # fmt: skip
    """``health[seed]`` of SB seeds from all partial sums; see ``finish``."""
    seed = tl.program_id(0) * SB + tl.arange(0, SB)
    finish(
        rank, pivots, moments, totals, stats, health, seed, 0.0, 0.0, False, seeds, width, rows, blocks, parts, C, EVEN, WHOLE, CHOICE, PB
    )


@triton.jit
def finish(
    rank, pivots, moments, totals, stats, health, seed, spread, close, known,
    seeds, width, rows, blocks, parts,
    C: tl.constexpr, EVEN: tl.constexpr, WHOLE: tl.constexpr, CHOICE: tl.constexpr, PB: tl.constexpr,
):  # fmt: skip
    """``health[seed]`` = mean, variance, near-zero fraction, correlation.

    ``moments`` come from ``parts`` programs of ``whole_rows_kernel`` if it measured all seeds, else from ``blocks`` of
    ``moments_kernel``.
    CHOICE: which of the two is known on the device alone; ``stats`` then hold one entry of an active seed, unless its ``spread`` and
    ``close`` are already ``known``, and ``parts`` of any other.
    """
    mine = seed < seeds
    moment_parts, stat_parts = blocks, tl.where(mine, parts, 0)
    if CHOICE:
        few = few_active(rank, seeds, WHOLE)
        moment_parts = tl.where(few, parts, blocks)
        active = tl.load(rank + seed, mask=mine, other=-1) >= 0
        stat_parts = tl.where(active & (few == 0), tl.where(known, 0, 1), stat_parts)
    elif WHOLE:
        moment_parts = parts
    start = chunk_start(seed, seeds, width, C, EVEN)
    size = tl.where(mine, chunk_size(start, seed, seeds, width, C, EVEN), 1).to(tl.float32)
    pivot = tl.load(pivots + seed, mask=mine, other=0.0)
    nothing = size * 0.0
    first, second, mixed, spread, close = nothing, nothing, nothing, nothing + spread, nothing + close
    total, squared = tl.zeros([PB], tl.float32), tl.zeros([PB], tl.float32)
    for begin in range(0, moment_parts, PB):
        part = begin + tl.arange(0, PB)
        mask = (part < moment_parts)[:, None] & mine[None, :]
        entry = (part.to(tl.int64)[:, None] * seeds + seed[None, :]) * 3
        first += tl.sum(tl.load(moments + entry, mask=mask, other=0.0), 0)
        second += tl.sum(tl.load(moments + entry + 1, mask=mask, other=0.0), 0)
        mixed += tl.sum(tl.load(moments + entry + 2, mask=mask, other=0.0), 0)
        total += tl.load(totals + part * 2, mask=part < moment_parts, other=0.0)
        squared += tl.load(totals + part * 2 + 1, mask=part < moment_parts, other=0.0)
    for begin in range(0, tl.max(stat_parts), PB):
        part = begin + tl.arange(0, PB)
        mask = part[:, None] < stat_parts[None, :]
        entry = (part.to(tl.int64)[:, None] * seeds + seed[None, :]) * 3
        spread += tl.sum(tl.load(stats + entry, mask=mask, other=0.0), 0)
        close += tl.sum(tl.load(stats + entry + 1, mask=mask, other=0.0), 0)
    count = rows * 1.0
    mean = first / count
    whole = tl.sum(total) / count
    variance_mean = second / count - mean * mean
    variance_total = tl.sum(squared) / count - whole * whole
    covariance = mixed / count - mean * whole
    # Of the others' sum T - size·m; their mean differs by a positive factor, which a correlation does not see.
    variance_others = variance_total - 2.0 * size * covariance + size * size * variance_mean
    shared = covariance - size * variance_mean
    others = whole - size * mean
    varies = (variance_mean > 1e-12 * mean * mean) & (variance_others > 1e-12 * others * others) & (size < width)
    scale = tl.sqrt(tl.where(varies, variance_mean, 1.0)) * tl.sqrt(tl.where(varies, variance_others, 1.0))
    correlation = tl.where(varies, tl.minimum(tl.maximum(shared / scale, -1.0), 1.0), 0.0)
    entry = health + seed * 4
    spread_mean = spread / (count * size) - mean * mean
    tl.store(entry, pivot + mean, mask=mine)
    tl.store(entry + 1, tl.where(spread_mean < 0.0, 0.0, spread_mean), mask=mine)
    tl.store(entry + 2, close / (count * size), mask=mine)
    tl.store(entry + 3, correlation, mask=mine)


@triton.jit
def totals_kernel(
    x, totals, unsound, width, rows, inner, xo, xi, xc,
    BM: tl.constexpr, BW: tl.constexpr, FLAT: tl.constexpr, XR: tl.constexpr,
):  # fmt: skip
    """``totals[row]`` = Σ over features of x minus its value in row 0, BM rows a program; ``unsound[program]``: one is not finite."""
    block, place = tl.program_id(0), tl.arange(0, BW)
    known = (block * BM + tl.arange(0, BM)) < rows
    sums = tl.zeros([BM, BW], tl.float32)
    for first in range(0, width, BW):
        inside = first + place < width
        tile = tl.load(
            tile_pointers(x, block, first, place, inner, xo, xi, xc, BM, XR, FLAT), mask=known[:, None] & inside[None, :], other=0.0
        )
        pivot = tl.load(x + (first + place).to(tl.int64) * xc, mask=inside, other=0.0)
        sums += tile.to(tl.float32) - pivot.to(tl.float32)[None, :]
    total = tl.sum(sums, 1)
    tl.store(totals + block * BM + tl.arange(0, BM), total, mask=known)
    tl.store(unsound + block, tl.max(tl.where(known & ((tl.abs(total) < float("inf")) == 0), 1, 0)))


@triton.jit
def windows_kernel(
    x, row_totals, unsound, moments, totals, stats, pivots, seeds, width, rows, parts, inner, xo, xi, xc, near_zero,
    G: tl.constexpr, GP: tl.constexpr, WC: tl.constexpr, BM: tl.constexpr, TM: tl.constexpr, ALIGN: tl.constexpr, WHOLE: tl.constexpr,
    C: tl.constexpr, EVEN: tl.constexpr, FLAT: tl.constexpr, XR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The sums of ``whole_rows_kernel`` for narrow chunks: a program takes G neighbouring ones and every ``parts``-th block of BM rows.

    The chunks' sums are a product with ones and zeros on the matrix units. Rows' totals, TM to an entry of ``unsound``, are known already.
    A product would spread a value that is not finite to neighbours, so such values are left out and noted if a total is not finite.
    WHOLE: no block has padded rows. Padded features are summed too, and belong to nobody.
    """
    group, part = tl.program_id(0), tl.program_id(1)
    place = group * G + tl.arange(0, GP)
    mine = (tl.arange(0, GP) < G) & (place < seeds)
    start = chunk_start(place, seeds, width, C, EVEN)
    size = chunk_size(start, place, seeds, width, C, EVEN)
    base = chunk_start(group * G, seeds, width, C, EVEN) // ALIGN * ALIGN
    col = tl.arange(0, WC)
    inside = base + col < width
    owned = (base + col[:, None] >= start[None, :]) & (base + col[:, None] < (start + size)[None, :]) & mine[None, :]
    row0 = tl.load(x + (base + col).to(tl.int64) * xc, mask=inside, other=0.0).to(tl.float32)
    share = 1.0 / tl.where(mine, size, 1).to(tl.float32)
    pivot = tl.sum(tl.where(owned, row0[:, None], 0.0), 0) * share
    pivot_of = tl.sum(tl.where(owned, pivot[None, :], 0.0), 1)
    choice = tl.where(owned, 1.0, 0.0).to(x.dtype.element_ty)
    spread, close = tl.zeros([BM, WC], tl.float32), tl.zeros([BM, WC], tl.float32)
    first, second, mixed = tl.zeros([BM, GP], tl.float32), tl.zeros([BM, GP], tl.float32), tl.zeros([BM, GP], tl.float32)
    lost = tl.zeros([GP], tl.float32)
    for block in range(part, tl.cdiv(rows, BM), parts):
        row = block * BM + tl.arange(0, BM)
        reads = tile_pointers(x, block, base, col, inner, xo, xi, xc, BM, XR, FLAT)
        if WHOLE:
            tile = tl.load(reads, mask=inside[None, :], other=0.0)
            whole = tl.load(row_totals + row)
            wide = tile.to(tl.float32)
            centred = wide - pivot_of[None, :]
            near = tl.abs(wide) < near_zero
        else:
            known = row < rows
            tile = tl.load(reads, mask=known[:, None] & inside[None, :], other=0.0)
            whole = tl.load(row_totals + row, mask=known, other=0.0)
            wide = tile.to(tl.float32)
            centred = tl.where(known[:, None], wide - pivot_of[None, :], 0.0)
            near = known[:, None] & (tl.abs(wide) < near_zero)
        spread += centred * centred
        close += tl.where(near, 1.0, 0.0)
        flag = block * (BM // TM) + tl.arange(0, BM // TM)
        if tl.max(tl.load(unsound + flag, mask=flag * TM < rows, other=0), 0) != 0:
            sound = tl.abs(wide) < float("inf")
            tile = tl.where(sound, tile, 0.0).to(tile.dtype)
            lost += tl.max(tl.where(owned, tl.max(tl.where(sound, 0.0, 1.0), 0)[:, None], 0.0), 0)
        mean = tl.dot(tile, choice, input_precision=PRECISION) * share[None, :] - pivot[None, :]
        if not WHOLE:
            mean = tl.where(known[:, None], mean, 0.0)
        first += mean
        second += mean * mean
        mixed += mean * whole[:, None]
    if part == 0:
        tl.store(pivots + place, pivot, mask=mine)
    entry = (part * seeds + place).to(tl.int64) * 3
    tl.store(stats + entry, tl.sum(tl.where(owned, tl.sum(spread, 0)[:, None], 0.0), 0), mask=mine)
    tl.store(stats + entry + 1, tl.sum(tl.where(owned, tl.sum(close, 0)[:, None], 0.0), 0), mask=mine)
    tl.store(moments + entry, tl.where(lost > 0.0, float("nan"), tl.sum(first, 0)), mask=mine)
    tl.store(moments + entry + 1, tl.sum(second, 0), mask=mine)
    tl.store(moments + entry + 2, tl.sum(mixed, 0), mask=mine)
    if group == 0:
        total, squared = tl.zeros([BM], tl.float32), tl.zeros([BM], tl.float32)
        for block in range(part, tl.cdiv(rows, BM), parts):
            row = block * BM + tl.arange(0, BM)
            whole = tl.load(row_totals + row, mask=row < rows, other=0.0)
            total += whole
            squared += whole * whole
        tl.store(totals + part * 2, tl.sum(total))
        tl.store(totals + part * 2 + 1, tl.sum(squared))
