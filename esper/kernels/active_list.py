"""Which seeds are active, found on the device: no wait for it, no recompile when it changes."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def write_active_list(alpha, objective, route, active_seeds, rank, seeds, BANKS: tl.constexpr, OBJECTIVES: tl.constexpr, SB: tl.constexpr):
    """``active_seeds[bank]`` = (count, its active seeds ascending); ``rank[seed]`` = its place there, -1 for an inactive seed.

    ``rank[seeds]`` is the count over all banks. One program writes it, SB seeds at a time, beside the programs that copy inactive chunks.
    """
    active_in_all = 0
    for bank in tl.static_range(BANKS):
        count = 0
        for first in range(0, seeds, SB):
            seed = first + tl.arange(0, SB)
            known = seed < seeds
            active = tl.load(alpha + seed, mask=known, other=0.0) != 0.0
            if OBJECTIVES:
                active = active | (tl.load(objective + seed * 2 + 1, mask=known, other=0.0) != 0.0)
            owner = tl.load(route + seed * 3, mask=known, other=-1)
            mine = (active & (owner == bank)).to(tl.int32)
            place = count + tl.cumsum(mine, 0) - mine
            tl.store(active_seeds + bank * (seeds + 1) + 1 + place, seed, mask=mine != 0)
            idle = (bank == 0) & ((owner < 0) | (active == 0))
            tl.store(rank + seed, tl.where(mine != 0, place, -1), mask=known & ((mine != 0) | idle))
            count += tl.sum(mine)
        tl.store(active_seeds + bank * (seeds + 1), count)
        active_in_all += count
    tl.store(rank + seeds, active_in_all)


@triton.jit
def active_list_kernel(alpha, objective, route, active_seeds, rank, seeds, BANKS: tl.constexpr, OBJECTIVES: tl.constexpr, SB: tl.constexpr):
    """:func:`write_active_list` alone, where the inactive chunks are copied otherwise."""
    write_active_list(alpha, objective, route, active_seeds, rank, seeds, BANKS, OBJECTIVES, SB)
