"""The earlier system's kernel, kept as a yardstick for the benchmark alone."""

import triton
import triton.language as tl


@triton.jit
def scale_kernel(x, y, weight, alpha, width, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """``y = x·w`` on an active chunk, ``y = x`` elsewhere; one program a row and seed."""
    row, seed = tl.program_id(0).to(tl.int64), tl.program_id(1)
    col = tl.arange(0, BLOCK)
    feature = seed * CHUNK + col
    value = tl.load(x + row * width + feature, mask=col < CHUNK)
    if tl.load(alpha + seed) != 0.0:
        value = (value * tl.load(weight + feature, mask=col < CHUNK)).to(value.dtype)
    tl.store(y + row * width + feature, value, mask=col < CHUNK)
