"""The branches op: all chunk-receptive branches of a site in one pass a direction, with telemetry, containment and autograd."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import triton_op, wrap_triton

from esper.kernels import chunk_backward, chunk_forward, launch
from esper.kernels.geometry import chunk_width
from esper.kernels.kinds import KINDS, Kind, Layers, layers, split_banks
from esper.kernels.telemetry import Partial, evenness, health_from_means, pass_through, passing_plan

PRECISION = "ieee"  # float32 products in float32; the compiler's default would be tf32


@triton_op("esper::branches", mutates_args=())
def branches(
    x: Tensor, alpha: Tensor, route: Tensor, lesson: Tensor | None, kinds: str, parameters: list[Tensor], measure: bool, near_zero: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(y, live, power, health)`` for ``x [outer, inner, W]``, as ``reference_branches.forward``; ``health [S, 4]`` if ``measure``."""
    seeds, rows = alpha.shape[0], x.shape[0] * x.shape[1]
    y = torch.empty_like(x)
    partial = Partial.empty(x, seeds, passing_plan(x, seeds).parts, measure)
    pass_through(x, y, alpha, route, partial, seeds, near_zero)
    live, power = torch.empty_like(alpha), torch.empty_like(alpha)
    banks = split_banks(kinds, parameters)
    order, rank = roster(alpha, None, route, len(banks))
    for number, (name, tensors) in enumerate(banks):
        kind, bank = KINDS[name], layers(name, tensors)
        plan = forward_plan(x, seeds, kind, bank)
        sums = alpha.new_empty(plan.programs, 3)
        wrap_triton(chunk_forward.chunk_forward_kernel)[(plan.programs,)](
            x, y, alpha, route, order[number], bank.w1, bank.b1, bank.wg, bank.bg, bank.w2, bank.b2, sums, partial.means, partial.pivots,
            seeds, x.shape[2], rows, x.shape[1], *x.stride(), *y.stride(), near_zero,
            **shape_of(kind, bank, x, seeds, plan), TELEMETRY=measure, HALF=x.dtype == torch.float16, PRECISION=PRECISION,
            num_warps=plan.warps, num_stages=plan.stages,
        )  # fmt: skip
        settle(x, y, alpha, route, order, rank, sums, partial, live, power, number, plan)
    health = health_from_means(x, partial, seeds) if measure else x.new_empty(0, 4, dtype=torch.float32)
    return y, live, power, health


def roster(alpha: Tensor, lesson: Tensor | None, route: Tensor, banks: int) -> tuple[Tensor, Tensor]:
    """``order [banks, S + 1]`` (count, active seeds) and ``rank [S]``, found on the device: no wait, no recompile."""
    seeds = alpha.shape[0]
    order, rank = route.new_empty(banks, seeds + 1), route.new_empty(seeds)
    block = min(1024, launch.power_of_two(seeds))
    wrap_triton(chunk_forward.roster_kernel)[(1,)](
        alpha,
        alpha if lesson is None else lesson,
        route,
        order,
        rank,
        seeds,
        BANKS=banks,
        LESSONS=lesson is not None,
        SB=block,
        num_warps=4,
    )
    return order, rank


def settle(x, y, alpha, route, order, rank, sums, partial: Partial, live, power, number: int, plan: launch.Launch) -> None:
    """Containment and the bank's sums; see ``settle_kernel``."""
    seeds, (outer, inner, width) = alpha.shape[0], x.shape
    place = min(128, launch.power_of_two(chunk_width(width, seeds)))
    shares = max(1, min(16, launch.limits(x.device).processors * 4 // seeds))
    wrap_triton(chunk_forward.settle_kernel)[(seeds, shares)](
        x, y, alpha, route, order[number], rank, sums, partial.stats, live, power,
        seeds, width, outer * inner, plan.programs, plan.rows, number, inner, *x.stride(), *y.stride(),
        BM=32, BC=place, **evenness(width, seeds), TELEMETRY=partial.telemetry, FLAT=outer == 1, num_warps=4,
    )  # fmt: skip


@branches.register_fake
def _(x, alpha, route, lesson, kinds, parameters, measure, near_zero):
    health = x.new_empty(alpha.shape[0] if measure else 0, 4, dtype=torch.float32)
    return torch.empty_like(x), torch.empty_like(alpha), torch.empty_like(alpha), health


@triton_op("esper::branches_backward", mutates_args=())
def branches_backward(
    x: Tensor, dy: Tensor, live: Tensor, lesson: Tensor | None, route: Tensor, kinds: str, parameters: list[Tensor]
) -> tuple[Tensor, list[Tensor], Tensor]:
    """``(dx, gradients, residual)`` as ``reference_branches.backward``."""
    assert dy.shape == x.shape, f"gradient {tuple(dy.shape)} of an output {tuple(x.shape)}"
    seeds = live.shape[0]
    dx = torch.empty_like(x)
    awake = live if lesson is None else torch.where(lesson[:, 1] != 0, torch.ones_like(live), live)
    pass_through(dy, dx, awake, route, Partial.empty(x, seeds, 1, False), seeds, 0.0)
    banks = split_banks(kinds, parameters)
    order, rank = roster(live, lesson, route, len(banks))
    grads: list[Tensor] = []
    residual = torch.zeros_like(live)
    for number, (name, tensors) in enumerate(banks):
        found, plan = bank_backward(x, dy, dx, live, lesson, route, order[number], name, tensors)
        targets = [torch.zeros_like(tensor) for tensor in tensors]
        slots = [*zip(found[:-1], targets, strict=True), *([(found[-1], None)] if lesson is not None else [])]
        for sums, target in slots:
            collect(sums, residual if target is None else target, route, order[number], rank, x, number, plan, by_seed=target is None)
        grads += targets
    return dx, grads, residual


def bank_backward(
    x: Tensor, dy: Tensor, dx: Tensor, live: Tensor, lesson: Tensor | None, route: Tensor, order: Tensor, name: str, tensors: list[Tensor]
) -> tuple[list[Tensor], launch.Launch]:
    """One bank's part of ``dx`` and its gradients' partial sums a program; the residuals' come last."""
    seeds, rows, kind, bank = live.shape[0], x.shape[0] * x.shape[1], KINDS[name], layers(name, tensors)
    plan = backward_plan(x, seeds, kind, bank, lesson is not None)
    partial = [tensor.new_empty(plan.programs, *tensor.shape[1:]) for tensor in tensors]
    residual = live.new_empty(plan.programs)
    into, whole = layers(name, partial), kind.affine or plan.hidden >= bank.hidden
    lessons = live if lesson is None else lesson
    geometry = (seeds, x.shape[2], rows, x.shape[1], *x.stride(), *dy.stride(), *dx.stride())
    common = shape_of(kind, bank, x, seeds, plan)
    settings = {"LESSONS": lesson is not None, "PRECISION": PRECISION, "num_warps": plan.warps, "num_stages": plan.stages}
    blocks = 1 if kind.affine else -(-bank.hidden // plan.hidden)
    wrap_triton(chunk_backward.chunk_backward_kernel)[(plan.programs, blocks)](
        x, dy, dx, live, lessons, route, order, bank.w1, bank.b1, bank.wg, bank.bg, bank.w2, bank.b2,
        into.w1, into.b1, into.wg, into.bg, into.w2, into.b2, residual, *geometry, **common, INPUT=whole, **settings,
    )  # fmt: skip
    if not whole:
        common.pop("AFFINE")
        wrap_triton(chunk_backward.chunk_input_gradient_kernel)[(plan.programs,)](
            x, dy, dx, live, lessons, route, order, bank.w1, bank.b1, bank.wg, bank.bg, bank.w2, *geometry, **common, **settings
        )
    return [*partial, residual], plan


def collect(sums: Tensor, target: Tensor, route: Tensor, order: Tensor, rank: Tensor, x: Tensor, number: int, plan: launch.Launch,
            by_seed: bool) -> None:  # fmt: skip
    """Add the programs' partial sums in a fixed order into ``target[slot]`` (``target[seed]`` if ``by_seed``)."""
    seeds, numel = rank.shape[0], sums.numel() // plan.programs
    block = min(1024, launch.power_of_two(numel))
    wrap_triton(chunk_backward.collect_kernel)[(seeds, -(-numel // block))](
        sums, target, route, order, rank, x.shape[0] * x.shape[1], plan.programs, number, numel,
        BM=plan.rows, BN=block, BY_SEED=by_seed, num_warps=4,
    )  # fmt: skip


@branches_backward.register_fake
def _(x, dy, live, lesson, route, kinds, parameters):
    return torch.empty_like(x), [torch.empty_like(tensor) for tensor in parameters], torch.empty_like(live)


def _save(ctx, inputs, output) -> None:
    x, _, route, lesson, kinds, parameters, _, _ = inputs
    ctx.kinds, ctx.taught, live = kinds, lesson is not None, output[1]
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(x, live, route, *([lesson] if lesson is not None else []), *parameters)


def _differentiate(ctx, dy, _live, _power, _health):
    x, live, route, *rest = ctx.saved_tensors
    lesson, parameters = (rest[0], rest[1:]) if ctx.taught else (None, rest)
    dx, grads, _ = branches_backward(x, dy, live, lesson, route, ctx.kinds, list(parameters))
    return dx, None, None, None, None, grads, None, None


branches.register_autograd(_differentiate, setup_context=_save)


def shape_of(kind: Kind, bank: Layers, x: Tensor, seeds: int, plan: launch.Launch) -> dict[str, object]:
    """The constants that a kernel is compiled for; none of them changes before a bank doubles."""
    outer, inner, width = x.shape
    chunk = chunk_width(width, seeds)
    padded, even = launch.power_of_two(chunk, 16), width % seeds == 0
    return {
        "C": chunk, "EVEN": even, "FULL": even and chunk == padded and outer * inner % plan.rows == 0, "FLAT": outer == 1,
        "H": bank.hidden, "CP": padded, "HB": plan.hidden, "BM": plan.rows,
        "AFFINE": kind.affine, "BIAS": kind.bias, "GATED": kind.gated, "ACT": kind.activation,
    }  # fmt: skip


def forward_plan(x: Tensor, seeds: int, kind: Kind, bank: Layers) -> launch.Launch:
    """Launch settings of the forward kernel for this site and bank."""
    chunk, hidden = launch.power_of_two(chunk_width(x.shape[2], seeds), 16), launch.power_of_two(bank.hidden, 16)
    return launch.forward(chunk, hidden, kind.gated, kind.affine, x.element_size(), seeds, launch.limits(x.device))


def backward_plan(x: Tensor, seeds: int, kind: Kind, bank: Layers, lessons: bool) -> launch.Launch:
    """Launch settings of the backward kernels for this site and bank."""
    chunk, hidden = launch.power_of_two(chunk_width(x.shape[2], seeds), 16), launch.power_of_two(bank.hidden, 16)
    return launch.backward(chunk, hidden, kind.gated, kind.affine, x.element_size(), seeds, launch.limits(x.device), lessons)
