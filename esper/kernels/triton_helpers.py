"""Parts that several kernels share: addresses, chunk bounds, the division of work, and tiles of weights."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def row_offsets(row, inner, outer_stride, inner_stride, FLAT: tl.constexpr):
    """Element offset of each row in int64; a site can hold more than 2**31 elements."""
    if FLAT:
        return row.to(tl.int64) * inner_stride
    else:
        return (row // inner).to(tl.int64) * outer_stride + (row % inner).to(tl.int64) * inner_stride


@triton.jit
def tile_pointers(base, block, start, col, inner, outer_stride, inner_stride, column_stride, BM: tl.constexpr, ROW: tl.constexpr,
                  FLAT: tl.constexpr):  # fmt: skip
    """Addresses ``[BM, len(col)]`` of one block of rows at the features ``start + col``.

    ROW is the distance of two rows if neighbouring features are neighbours in memory, else 0. As it is known at compile time, all
    addresses of a thread are one register and fixed distances, which saves a third of the registers and of the instructions.
    """
    row = tl.arange(0, BM)
    if ROW > 0:
        return base + (tl.cast(block, tl.int64) * (BM * ROW) + start) + (row[:, None] * ROW + col[None, :])
    column = (start + col).to(tl.int64)
    return base + row_offsets(block * BM + row, inner, outer_stride, inner_stride, FLAT)[:, None] + column[None, :] * column_stride


@triton.jit
def chunk_start(seed, seeds, width, C: tl.constexpr, EVEN: tl.constexpr):
    """First feature of a seed's chunk, floor(seed * width / seeds); EVEN chunks of C features let the compiler see the alignment."""
    if EVEN:
        return seed * C
    else:
        return (seed.to(tl.int64) * width // seeds).to(tl.int32)  # the product needs int64


@triton.jit
def chunk_size(start, seed, seeds, width, C: tl.constexpr, EVEN: tl.constexpr):
    """Features of a seed's chunk: C, or one fewer in an uneven site."""
    if EVEN:
        return start * 0 + C
    else:
        return chunk_start(seed + 1, seeds, width, C, EVEN) - start


@triton.jit
def assignment(active_seeds, pid, programs, blocks):
    """Which seed and row part a program works on: ``active_seeds`` holds a bank's count of active seeds, then the seeds.

    Programs are dealt out over the active seeds alone, so that few of them still fill the device. Returns (seed, part, parts);
    parts is 0 for a program without work.
    """
    count = tl.load(active_seeds)
    parts = tl.minimum(programs // tl.maximum(count, 1), blocks)
    parts = tl.minimum(tl.maximum(parts, 1), 128)
    parts = tl.where(pid < count * parts, parts, 0)
    rank = pid % tl.maximum(count, 1)
    seed = tl.load(active_seeds + 1 + rank, mask=parts > 0, other=0)
    return seed, pid // tl.maximum(count, 1), parts


@triton.jit
def seed_parts(active_seeds, rows, programs, BM: tl.constexpr, PACKED: tl.constexpr):
    """Active seeds of a bank (at least 1), and programs of each, PACKED seeds to a program: see ``assignment``."""
    count = tl.maximum(tl.load(active_seeds), 1)
    return count, tl.minimum(tl.maximum(tl.minimum(programs // tl.cdiv(count, PACKED), tl.cdiv(rows, BM)), 1), 128)


@triton.jit
def few_active(rank, seeds, WHOLE: tl.constexpr):
    """Whether the kernel over whole rows measures all seeds, active ones included, because at most a quarter of them is active.

    ``rank[seeds]`` is their number. Reading the active chunks once more then costs less than leaving row means for a second pass.
    """
    if WHOLE:
        return tl.load(rank + seeds) * 4 <= seeds
    else:
        return seeds < 0


@triton.jit
def weight_tile(pointer, slot, read, write, first, reads, writes, READS: tl.constexpr, WRITES: tl.constexpr, dtype: tl.constexpr):
    """``[read, write]`` tile of one slot of a stack ``[cap, READS, WRITES]``, zero outside the first ``reads`` × ``writes``."""
    offset = slot * (READS * WRITES) + read[:, None] * WRITES + (first + write)[None, :]
    mask = (read[:, None] < reads) & ((first + write)[None, :] < writes)
    return tl.load(pointer + offset, mask=mask, other=0.0).to(dtype)


@triton.jit
def weight_tile_rows(pointer, slot, read, write, first, reads, writes, READS: tl.constexpr, WRITES: tl.constexpr, dtype: tl.constexpr):
    """As :func:`weight_tile`, but ``first`` shifts the rows read (a block of hidden units of the second layer)."""
    offset = slot * (READS * WRITES) + (first + read)[:, None] * WRITES + write[None, :]
    mask = ((first + read)[:, None] < reads) & (write[None, :] < writes)
    return tl.load(pointer + offset, mask=mask, other=0.0).to(dtype)
