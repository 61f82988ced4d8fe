"""Launch settings by rule from the device's limits: no autotune, so that the same machine always adds in the same order."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch


@dataclass(frozen=True)
class Limits:
    """Properties of a device: multiprocessors, shared memory of a block (bytes), registers and threads of a multiprocessor."""

    capability: tuple[int, int]
    processors: int
    shared: int
    registers: int = 65536
    threads: int = 2048

    @property
    def wgmma(self) -> bool:
        """Hopper's warp-group products, which take their right operand from shared memory."""
        return self.capability[0] == 9


@dataclass(frozen=True)
class Launch:
    """Rows a block, hidden units a block, warps, pipeline stages, programs in all, and seeds that one program takes at once."""

    rows: int
    hidden: int
    warps: int
    stages: int
    programs: int
    packed: int = 1


# The interpreter runs programs one after another: one multiprocessor keeps them few, three parts keep the reductions honest.
INTERPRETED = Limits((0, 0), processors=2, shared=1 << 20)


@lru_cache
def _limits(index: int) -> Limits:
    device: Any = torch.cuda.get_device_properties(index)  # its stub lacks two of the fields
    return Limits(
        (device.major, device.minor),
        device.multi_processor_count,
        device.shared_memory_per_block_optin,
        device.regs_per_multiprocessor,
        device.max_threads_per_multi_processor,
    )


def limits(device: torch.device) -> Limits:
    """Limits of a CUDA device; for the interpreter (CPU tensors) made-up ones."""
    if device.type != "cuda":
        return INTERPRETED
    return _limits(torch.cuda.current_device() if device.index is None else device.index)


def power_of_two(n: int, low: int = 1) -> int:
    """Smallest power of two ≥ n and ≥ low."""
    return max(low, 1 << max(0, n - 1).bit_length())


def row_parts(groups: int, rows: int, block: int, resident: int, limit: Limits) -> int:
    """Row parts a group of seeds: enough to fill the device once with ``resident`` programs a multiprocessor, at most one a block."""
    return max(1, min(limit.processors * resident // groups, -(-rows // block), 64))


def programs(seeds: int, resident: int, limit: Limits) -> int:
    """Programs of a kernel over active seeds: the device filled once, and one for every seed in case all are active."""
    return max(seeds, limit.processors * resident)


def resident(registers: int, warps: int, shared: int, limit: Limits) -> int:
    """Programs that one multiprocessor holds at once, by registers a thread, threads and shared memory (at least 1)."""
    threads = 32 * warps
    return max(1, min(limit.registers // (threads * registers), limit.threads // threads, limit.shared // max(shared, 1)))


@lru_cache(maxsize=1024)  # called at every call of an op
def forward(chunk: int, hidden: int, gated: bool, affine: bool, itemsize: int, seeds: int, limit: Limits, telemetry: bool = True) -> Launch:
    """Settings of the forward kernel for chunks and hidden widths padded to powers of two ≥ 16.

    Timed on an H100, bfloat16, relu (docs/kernels.md, "Measured"): four warps for 64 rows, so that no two of them compute the same tile,
    and as many programs as registers allow; at width 32 eight for 128 rows. At 128 two stages with telemetry, else three.
    Shared memory shrinks stages first, then hidden block, then rows.
    """
    if affine:
        return Launch(max(16, min(128, 8192 // chunk)), 16, 4, 2, programs(seeds, 4, limit))
    tile, stages, wide = in_registers(chunk, hidden, gated) if itemsize > 2 else hidden, 3, max(chunk, hidden)
    block, warps = 64 if itemsize == 2 else 32 if chunk < 128 else 16, 4 if wide <= 64 else 8
    if limit.wgmma and itemsize == 2 and wide <= (64 if gated else 128):  # beyond, four warps lack registers
        block, warps = (128, 8) if wide <= 32 else (64, 4)
        stages = 2 if telemetry and wide > 64 else 3
    stages = 1 if tile < hidden else stages  # else the blocks of weights would be under way several at a time
    while forward_shared(block, chunk, tile, gated, itemsize, stages) > limit.shared:
        if stages > 1:
            stages -= 1
        elif tile > 32:
            tile //= 2
        else:
            block //= 2
            assert block >= 16, "no block fits"
    used = forward_shared(block, chunk, tile, gated, itemsize, stages) - padding(chunk, tile, gated)
    registers = min(255, block * (tile + 2 * chunk) // (32 * warps) + 64)
    return Launch(block, tile, warps, stages, programs(seeds, resident(registers, warps, used, limit), limit))


TILE = 16
"""Features of the narrowest tile of a product."""


@lru_cache(maxsize=1024)
def packed(chunk: int, hidden: int, itemsize: int, seeds: int, limit: Limits, back: bool) -> Launch | None:
    """Settings of the kernels for narrow chunks, several of which share a tile; None where chunks or hidden layers are too wide for that.

    Timed on an H200, chunks of 3 and 4 features, 16 hidden units, one seed in ten: forward two warps for 64 rows, as many programs as the
    registers hold; backward one warp for 16 rows, and three times as many programs, since they wait for memory.
    """
    together, units = TILE // power_of_two(chunk), power_of_two(hidden, 16)
    if itemsize > 2 or chunk > WINDOWED or together * units > 64:
        return None
    rows, warps, waves = (16, 1, 3) if back else (64, 2, 1)
    most = programs(-(-seeds // together), waves * resident(255, warps, 1, limit), limit)
    return Launch(rows, units, warps, 2, most, together)


def in_registers(chunk: int, hidden: int, gated: bool) -> int:
    """Hidden units a block in float32, whose products have their operands in registers: a quarter of them for the weights.

    With more, the compiler gives up and keeps next to nothing in registers (seen in `scripts/bench kernel_resources`).
    """
    while hidden > 16 and (3 if gated else 2) * chunk * hidden > 16384:
        hidden //= 2
    return hidden


def padding(chunk: int, hidden: int, gated: bool) -> int:
    """Bytes that the forward's tiles are padded by, at most (seen in `scripts/bench kernel_resources`)."""
    return 8 * max(chunk, hidden) * (3 if gated else 2)


def forward_shared(block: int, chunk: int, hidden: int, gated: bool, itemsize: int, stages: int) -> int:
    """Upper bound in bytes: all weights, the input tiles under way, and one hidden or output tile that changes hands."""
    weights, tiles = chunk * hidden * (3 if gated else 2) * itemsize, max(1, stages - 1) * block * chunk * itemsize
    return weights + tiles + block * max(hidden, chunk) * itemsize + padding(chunk, hidden, gated)


@lru_cache(maxsize=1024)
def backward(
    chunk: int, hidden: int, gated: bool, affine: bool, itemsize: int, seeds: int, limit: Limits, objectives: bool = False
) -> Launch:
    """Settings of the backward kernel; a block of hidden units is as large as its gradient accumulators leave registers for.

    Timed likewise: at width 32 128 rows with 4 warps, at 64 64 rows with 4 warps, at 128 half of the hidden units with 128 rows, 8 warps
    and two stages. ``objectives``: the kernel also computes δ, for the isolated objectives.
    """
    if affine:
        return Launch(max(16, min(64, 4096 // chunk)), 16, 4, 2, programs(seeds, 4, limit))
    tile, products = in_registers(chunk, hidden, gated) if itemsize > 2 else hidden, 3 if gated else 2
    quick = limit.wgmma and itemsize == 2 and not gated
    # Accumulators may take half of the registers, a quarter where 128 rows at once then make up for the second kernel.
    while tile > 16 and products * chunk * tile > limit.registers // (4 if quick else 2):
        tile //= 2
    size, warps = products * chunk * tile, 4 if products * chunk * tile <= 8192 else 8
    block = (32 if chunk < 128 else 16) if itemsize > 2 else 128 if size <= 2048 or (quick and tile < hidden) else 64
    if itemsize == 2 and tile == 16 and size <= 2048 and chunk != 32:  # 128 rows spill at 64, and keep others from running at 16
        block, warps = 32, 1 if chunk == 16 else 4
    block = block if limit.wgmma or itemsize > 2 else block // 2  # without warp-group products every operand sits in registers
    block = max(16, block // 2) if objectives else block  # δ and what it misses are two more tiles in registers
    stages = 3 if warps == 4 else 2
    while backward_shared(block, chunk, tile, gated, itemsize, stages, hidden > tile, objectives) > limit.shared:
        if stages > 1:
            stages -= 1
        elif block > 16:
            block //= 2
        else:
            tile //= 2
            assert tile >= 16, "no block fits"
    used = backward_shared(block, chunk, tile, gated, itemsize, stages, hidden > tile, objectives)
    registers = min(255, (products * chunk * tile + block * (2 * tile + chunk)) // (32 * warps) + (64 if warps > 1 else 80))
    # All blocks of hidden units at once, so that the rows that one reads are still in the cache for the others.
    return Launch(block, tile, warps, stages, max(seeds, limit.processors * resident(registers, warps, used, limit) * tile // hidden))


def backward_shared(
    block: int, chunk: int, hidden: int, gated: bool, itemsize: int, stages: int, split: bool = False, objectives: bool = False
) -> int:
    """Upper bound in bytes: weights, pipelined x and dy tiles, converted hidden-side tiles, g, one output tile in float32.

    ``split``: a block does not hold all hidden units, so that another kernel gives ``dx``, and δ, which ``objectives`` need, takes three
    more matrices of weights and a hidden tile; unsplit, δ is three more tiles (seen: one to three).
    """
    matrix = chunk * hidden * itemsize
    tiles, units = 2 * stages * block * chunk * itemsize, (3 if gated else 2) * block * hidden * itemsize
    if split and not objectives:
        return (5 if gated else 3) * matrix + tiles + units
    most = (5 if gated else 3) * matrix + tiles + max(units, block * chunk * 4)
    if not objectives:
        return most
    return most + (3 * matrix + block * hidden * itemsize if split else 3 * block * chunk * 4)


@lru_cache(maxsize=1024)
def input_gradient(chunk: int, hidden: int, gated: bool, itemsize: int, seeds: int, limit: Limits, launch: Launch) -> Launch:
    """Settings of the kernel for ``dx`` alone, beside a backward ``launch`` whose block does not hold all hidden units.

    With warp-group products all weights stay in shared memory, with one stage, so that two programs share a multiprocessor (timed
    likewise); else blocks of the plan's size, read again for every tile.
    """
    used = input_gradient_shared(64, chunk, hidden, gated, itemsize, 1, False)
    if limit.wgmma and itemsize == 2 and not gated and hidden <= 128 and used <= limit.shared:
        return Launch(64, hidden, 4, 1, programs(seeds, resident(255, 4, used, limit), limit))
    block, tile, stages = min(launch.rows, 64), launch.hidden, launch.stages
    while input_gradient_shared(block, chunk, tile, gated, itemsize, stages, True) > limit.shared:
        if stages > 1:
            stages -= 1
        elif block > 16:
            block //= 2
        else:
            tile //= 2
            assert tile >= 16, "no block fits"
    return Launch(block, tile, launch.warps, stages, programs(seeds, 1, limit))


def input_gradient_shared(block: int, chunk: int, hidden: int, gated: bool, itemsize: int, stages: int, split: bool) -> int:
    """Upper bound in bytes: weights, x and dy tiles under way, a tile that changes hands.

    ``split``: weights come block after block of hidden units, some of them under way too, and more tiles change hands.
    """
    matrix, tiles = chunk * hidden * itemsize, 2 * stages * block * chunk * itemsize
    if not split:
        return (3 if gated else 2) * matrix + tiles + block * max(hidden, chunk) * itemsize
    units = max((3 if gated else 2) * block * hidden * itemsize, block * chunk * 4)
    return (5 if gated else 3) * matrix + tiles + units + block * chunk * 4


@dataclass(frozen=True)
class InactiveChunksLaunch:
    """Rows, seeds and places of a tile, pipeline stages, row parts."""

    rows: int
    seeds: int
    places: int
    stages: int
    parts: int


@lru_cache(maxsize=1024)
def inactive_chunks(width: int, seeds: int, rows: int, limit: Limits) -> InactiveChunksLaunch:
    """Settings of the copying kernel: tiles of whole neighbouring chunks, 256 features wide where chunks allow."""
    place = min(power_of_two(-(-width // seeds)), 256)
    group = max(1, min(power_of_two(seeds), 256 // place))
    block = max(1, min(16, power_of_two(rows)))
    return InactiveChunksLaunch(block, group, place, 3, row_parts(-(-seeds // group), rows, block, 4, limit))


@dataclass(frozen=True)
class WholeRowsLaunch:
    """Rows, seeds and places of a tile, warps, row parts, pipeline stages."""

    rows: int
    seeds: int
    places: int
    warps: int
    parts: int
    stages: int


@lru_cache(maxsize=1024)
def whole_rows(width: int, seeds: int, rows: int, itemsize: int, limit: Limits, copies: bool = False) -> WholeRowsLaunch | None:
    """Settings of the whole-row telemetry kernel; None where a row is too wide for registers, or has so many seeds that their sums are.

    Shared memory holds the tiles that are under way, and shrinks the stages. One that ``copies`` fares best with fewer stages and programs.
    """
    place, group = power_of_two(-(-width // seeds)), power_of_two(seeds)
    tile = place * group
    if tile > 8192 or group > 512:  # so many chunks are narrow, and measured in windows
        return None
    warps = 8 if tile > 4096 else 4
    block = max(1, min(2048 // tile, power_of_two(rows)))
    stages, held = (3, 2) if copies else (5, 3)
    while stages > 1 and whole_rows_shared(block, tile, itemsize, stages, copies) > limit.shared:
        stages -= 1
    parts = max(1, min(limit.processors * held, -(-rows // block)))
    return WholeRowsLaunch(block, group, place, warps, parts, stages)


def whole_rows_shared(block: int, tile: int, itemsize: int, stages: int, copies: bool = False) -> int:
    """Upper bound in bytes: the tiles under way (or one, to exchange between threads), and a few words a warp, a seed if it ``copies``."""
    return max(1, stages - 1) * block * tile * itemsize + (4 * tile if copies else 256)


WINDOWED = 8
"""Features up to which a chunk is measured in a window with its neighbours."""


@dataclass(frozen=True)
class WindowsLaunch:
    """Settings of the kernels over windows of narrow chunks: rows, chunks and features of a window, parts of the rows, rows of a total."""

    rows: int
    seeds: int
    places: int
    width: int
    parts: int
    totals_rows: int


@lru_cache(maxsize=1024)
def windows(width: int, seeds: int, rows: int, limit: Limits) -> WindowsLaunch | None:
    """Settings of the kernels that measure narrow chunks; None for wider ones.

    A window of 64 features begins at a multiple of 8, so that rows are read 16 bytes at a time; 16 chunks of it are one tile of a
    product. 32 rows are what four warps hold without spilling (seen in `scripts/bench kernel_resources`).
    """
    if -(-width // seeds) > WINDOWED:
        return None
    span = 64
    held = min((span - 7) * seeds // width, 16)
    return WindowsLaunch(32, held, 16, span, row_parts(-(-seeds // held), rows, 32, 3, limit), 8)


def windows_shared(launch: WindowsLaunch, itemsize: int) -> int:
    """Upper bound in bytes: three tiles under way, the ones and zeros, and what warps exchange."""
    return 3 * launch.rows * launch.width * itemsize + launch.width * launch.places * itemsize + 4096
