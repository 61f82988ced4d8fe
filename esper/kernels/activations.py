"""The activations of the Triton kernels and their derivatives; ``reference_branches`` has them in torch."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def activate(h, ACT: tl.constexpr):
    """identity, relu, gelu (exact, erf) or silu, in float32."""
    if ACT == "relu":
        # NaN must survive, so that containment sees it.
        return tl.maximum(h, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACT == "gelu":
        return 0.5 * h * (1.0 + tl.erf(h * 0.7071067811865476))
    elif ACT == "silu":
        return h * tl.sigmoid(h)
    else:
        return h


@triton.jit
def activate_gradient(h, ACT: tl.constexpr):
    """Derivative of :func:`activate` at ``h``."""
    if ACT == "relu":
        return tl.where(h > 0.0, 1.0, 0.0)
    elif ACT == "gelu":
        density = 0.3989422804014327 * tl.exp(-0.5 * h * h)
        return 0.5 * (1.0 + tl.erf(h * 0.7071067811865476)) + h * density
    elif ACT == "silu":
        gate = tl.sigmoid(h)
        return gate * (1.0 + h * (1.0 - gate))
    else:
        return tl.full(h.shape, 1.0, tl.float32)
