"""The branches op: all chunk-receptive branches of a site in one pass a direction, with telemetry, containment and autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from esper.kernels import chunk_backward, chunk_forward, launch_rules, packed_chunks
from esper.kernels.branch_kinds import KINDS, BankTensors, BranchKind, bank_tensors, split_banks
from esper.kernels.chunk_layout import chunk_width
from esper.kernels.telemetry import (
    ActiveList,
    PartialSums,
    chunk_constants,
    finish,
    health_group,
    measure_and_copy,
    measure_windows,
    moments_of_means,
    row_distance,
)

PRECISION = "ieee"  # float32 products in float32; the compiler's default would be tf32


@custom_op("esper::branches", mutates_args=())
def branches(
    x: Tensor, alpha: Tensor, route: Tensor, objective: Tensor | None, kinds: str, parameters: list[Tensor], measure: bool, near_zero: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(y, live, power, health)`` for ``x [outer, inner, W]``, as ``reference_branches.forward``; ``health [S, 4]`` if ``measure``."""
    seeds, rows, banks = alpha.shape[0], x.shape[0] * x.shape[1], split_banks(kinds, parameters)
    y, live, power = torch.empty_like(x), torch.empty_like(alpha), torch.empty_like(alpha)
    windows = launch_rules.windows(x.shape[2], seeds, rows, launch_rules.limits(x.device)) if measure else None
    measure = measure and windows is None  # in the kernels below
    health = x.new_empty(seeds if measure else 0, 4, dtype=torch.float32)
    if windows is not None:
        health = measure_windows(x, seeds, near_zero, windows)
    partial, active = PartialSums.empty(x, seeds, measure, copies=True), ActiveList.empty(alpha, None, route, len(banks))
    measure_and_copy(x, partial, seeds, near_zero, y, active)
    together = measure and health_group(seeds)[0] == 1
    for number, (name, tensors) in enumerate(banks):
        sums, launch = bank_forward(x, y, None, partial, active, number, name, tensors, near_zero)
        last = number == len(banks) - 1
        if last and measure:
            moments_of_means(x, partial, active)
        contain(x, y, None, active, sums, partial, live, power, health, number, launch, together and last)
    if measure and not together:
        health = finish(x, partial, active)
    return y, live, power, health


def bank_forward(
    x: Tensor, y: Tensor, kept: Tensor | None, partial: PartialSums, active: ActiveList, number: int, name: str, tensors: list[Tensor],
    near_zero: float,
) -> tuple[Tensor, launch_rules.Launch]:  # fmt: skip
    """The chunks of one bank's branches, with the programs' sums ``[…, 3]``; into ``kept`` what they were, if ``y`` is ``x``."""
    seeds, rows, kind, bank = active.alpha.shape[0], x.shape[0] * x.shape[1], KINDS[name], bank_tensors(name, tensors)
    launch = None if partial.telemetry else packed_launch(x, seeds, kind, bank, back=False)
    if launch is not None:
        sums = active.alpha.new_empty(launch.programs * launch.packed, 3)
        packed_chunks.packed_forward_kernel[(launch.programs,)](
            x, y, y if kept is None else kept, active.alpha, active.route, active.seeds[number], bank.w1, bank.b1, bank.w2, bank.b2, sums,
            seeds, x.shape[2], rows, x.shape[1], *x.stride(), *y.stride(), **packed_constants(kind, bank, x, seeds, launch),
            XR=row_distance(x), YR=row_distance(y), HALF=x.dtype == torch.float16, KEEPS=kept is not None,
            STAGES=launch.stages, PRECISION=PRECISION, num_warps=launch.warps,
        )  # fmt: skip
        return sums, launch
    launch = forward_launch(x, seeds, kind, bank, partial.telemetry)
    sums = active.alpha.new_empty(launch.programs, 3)
    chunk_forward.chunk_forward_kernel[(launch.programs,)](
        x, y, y if kept is None else kept, active.alpha, active.route, active.seeds[number], active.rank,
        bank.w1, bank.b1, bank.wg, bank.bg, bank.w2, bank.b2, sums, partial.means, partial.pivots,
        seeds, x.shape[2], rows, x.shape[1], *x.stride(), *y.stride(), near_zero,
        **kernel_constants(kind, bank, x, seeds, launch), XR=row_distance(x), YR=row_distance(y),
        TELEMETRY=partial.telemetry, WHOLE=partial.whole, HALF=x.dtype == torch.float16, KEEPS=kept is not None,
        STAGES=launch.stages, PLAIN_STAGES=forward_launch(x, seeds, kind, bank, False).stages, PRECISION=PRECISION,
        num_warps=launch.warps,
    )  # fmt: skip
    return sums, launch


def contain(
    x: Tensor, y: Tensor, kept: Tensor | None, active: ActiveList, sums: Tensor, partial: PartialSums, live: Tensor, power: Tensor,
    health: Tensor, number: int, launch: launch_rules.Launch, last: bool,
) -> None:  # fmt: skip
    """Containment and the bank's sums, with the ``last`` one all seeds' health; see ``containment_kernel``."""
    (outer, inner, width), (seeds, _, rows, blocks, parts) = x.shape, partial.size(x)
    place = min(128, launch_rules.power_of_two(chunk_width(width, seeds)))
    shares = max(1, min(16, launch_rules.limits(x.device).processors * 4 // seeds))
    chunk_forward.containment_kernel[(seeds, shares)](
        x, y, y if kept is None else kept, active.alpha, active.route, active.seeds[number], active.rank, sums, live, power,
        *partial.sums, health,
        seeds, width, rows, launch.programs, launch.rows, number, inner, *x.stride(), *y.stride(), blocks, parts,
        BM=32, BC=place, **chunk_constants(width, seeds), FLAT=outer == 1, TELEMETRY=partial.telemetry,
        KEEPS=kept is not None, WHOLE=partial.whole, FINISH=last,
        PB=health_group(seeds)[1], PACKED=launch.packed, num_warps=4,
    )  # fmt: skip


@branches.register_fake
def _(
    x: Tensor, alpha: Tensor, route: Tensor, objective: Tensor | None, kinds: str, parameters: list[Tensor], measure: bool, near_zero: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    health = x.new_empty(alpha.shape[0] if measure else 0, 4, dtype=torch.float32)
    return torch.empty_like(x), torch.empty_like(alpha), torch.empty_like(alpha), health


@custom_op("esper::branches_backward", mutates_args=())
def branches_backward(
    x: Tensor, dy: Tensor, live: Tensor, objective: Tensor | None, route: Tensor, kinds: str, parameters: list[Tensor]
) -> tuple[Tensor, list[Tensor], Tensor]:
    """``(dx, gradients, residual)`` as ``reference_branches.backward``; ``residual`` is empty without an ``objective``."""
    assert dy.shape == x.shape, f"gradient {tuple(dy.shape)} of an output {tuple(x.shape)}"
    seeds = live.shape[0]
    dx = torch.empty_like(x)
    banks = split_banks(kinds, parameters)
    active = ActiveList.empty(live, objective, route, len(banks))
    measure_and_copy(dy, PartialSums.empty(x, seeds, False, copies=True), seeds, 0.0, dx, active)
    grads: list[Tensor] = []
    residual = live.new_empty(0) if objective is None else torch.zeros_like(live)
    for number, (name, tensors) in enumerate(banks):
        found, launch = bank_backward(x, dy, dx, live, objective, route, active.seeds[number], name, tensors)
        grads += sum_gradients(found[:-1], [torch.empty_like(tensor) for tensor in tensors], active, x, number, launch)
        if objective is not None:
            chunk_backward.sum_residuals_kernel[(seeds,)](
                found[-1], residual, route, active.seeds[number], active.rank, x.shape[0] * x.shape[1], launch.programs, number,
                BM=launch.rows, num_warps=1,
            )  # fmt: skip
    return dx, grads, residual


def bank_backward(
    x: Tensor,
    dy: Tensor,
    dx: Tensor,
    live: Tensor,
    objective: Tensor | None,
    route: Tensor,
    active_seeds: Tensor,
    name: str,
    tensors: list[Tensor],
    kept: Tensor | None = None,
) -> tuple[list[Tensor], launch_rules.Launch]:
    """One bank's part of ``dx`` and its gradients' partial sums a program; the residuals' come last.

    ``kept`` holds the bank's chunks of the site's input if ``x`` does not hold them any more.
    """
    seeds, rows, kind, bank = live.shape[0], x.shape[0] * x.shape[1], KINDS[name], bank_tensors(name, tensors)
    launch = None if objective is not None else packed_launch(x, seeds, kind, bank, back=True)
    if launch is not None:
        return packed_backward(x, dy, dx, live, route, active_seeds, name, tensors, kept, launch), launch
    launch = backward_launch(x, seeds, kind, bank, objective is not None)
    partial = [tensor.new_empty(launch.programs, *tensor.shape[1:]) for tensor in tensors]
    residual = live.new_empty(launch.programs)
    into, whole = bank_tensors(name, partial), kind.affine or launch.hidden >= bank.hidden
    objectives = live if objective is None else objective
    geometry = (seeds, x.shape[2], rows, x.shape[1], *x.stride(), *dy.stride(), *dx.stride())
    distances = {"XR": row_distance(x), "GR": row_distance(dy), "DR": row_distance(dx)}
    common = kernel_constants(kind, bank, x, seeds, launch) | distances
    settings = {"OBJECTIVES": objective is not None, "KEPT": kept is not None, "PRECISION": PRECISION}
    settings |= {"num_warps": launch.warps, "num_stages": launch.stages}
    source = x if kept is None else kept
    blocks = 1 if kind.affine else -(-bank.hidden // launch.hidden)
    chunk_backward.chunk_backward_kernel[(launch.programs, blocks)](
        source, dy, dx, live, objectives, route, active_seeds, bank.w1, bank.b1, bank.wg, bank.bg, bank.w2, bank.b2,
        into.w1, into.b1, into.wg, into.bg, into.w2, into.b2, residual, *geometry, **common, INPUT=whole, **settings,
    )  # fmt: skip
    if not whole:
        alone = input_gradient_launch(x, seeds, kind, bank, launch)
        common = kernel_constants(kind, bank, x, seeds, alone) | distances
        common.pop("AFFINE")
        settings |= {"num_warps": alone.warps, "num_stages": alone.stages}
        chunk_backward.chunk_input_gradient_kernel[(alone.programs,)](
            source, dy, dx, live, objectives, route, active_seeds, bank.w1, bank.b1, bank.wg, bank.bg, bank.w2, *geometry,
            **common, **settings,
        )  # fmt: skip
    return [*partial, residual], launch


def packed_backward(
    x: Tensor, dy: Tensor, dx: Tensor, live: Tensor, route: Tensor, active_seeds: Tensor, name: str, tensors: list[Tensor],
    kept: Tensor | None, launch: launch_rules.Launch,
) -> list[Tensor]:  # fmt: skip
    """``bank_backward`` of narrow chunks, without objectives; its sums come a seed and part."""
    seeds, kind, bank = live.shape[0], KINDS[name], bank_tensors(name, tensors)
    partial = [tensor.new_empty(launch.programs * launch.packed, *tensor.shape[1:]) for tensor in tensors]
    into = bank_tensors(name, partial)
    packed_chunks.packed_backward_kernel[(launch.programs,)](
        x if kept is None else kept, dy, dx, live, route, active_seeds, bank.w1, bank.b1, bank.w2, bank.b2,
        into.w1, into.b1, into.w2, into.b2,
        seeds, x.shape[2], x.shape[0] * x.shape[1], x.shape[1], *x.stride(), *dy.stride(), *dx.stride(),
        **packed_constants(kind, bank, x, seeds, launch), KEPT=kept is not None,
        XR=row_distance(x), GR=row_distance(dy), DR=row_distance(dx), STAGES=launch.stages, PRECISION=PRECISION, num_warps=launch.warps,
    )  # fmt: skip
    return [*partial, live]  # no residuals


def sum_gradients(
    sums: list[Tensor], targets: list[Tensor], active: ActiveList, x: Tensor, number: int, launch: launch_rules.Launch
) -> list[Tensor]:
    """Add the programs' partial ``sums`` of a bank's gradients into ``targets``, in a fixed order, all in one launch."""
    sizes, seeds = [tensor[0].numel() for tensor in targets], active.alpha.shape[0]
    block = min(1024, launch_rules.power_of_two(max(sizes)))
    pairs = [tensor for pair in zip(sums, targets, strict=True) for tensor in pair]
    pairs += pairs[:2] * (6 - len(targets))  # an absent one repeats the first, and is never touched
    chunk_backward.sum_gradients_kernel[(targets[0].shape[0], sum(-(-size // block) for size in sizes))](
        *pairs, active.route, active.seeds[number], active.rank, seeds, x.shape[0] * x.shape[1], launch.programs, number,
        **{f"N{place}": size for place, size in enumerate(sizes + [0] * (6 - len(sizes)))},
        BM=launch.rows, BN=block, SB=min(1024, launch_rules.power_of_two(seeds)), PACKED=launch.packed, num_warps=4,
    )  # fmt: skip
    return targets


@branches_backward.register_fake
def _(
    x: Tensor, dy: Tensor, live: Tensor, objective: Tensor | None, route: Tensor, kinds: str, parameters: list[Tensor]
) -> tuple[Tensor, list[Tensor], Tensor]:
    residual = live.new_empty(0 if objective is None else live.shape[0])
    return torch.empty_like(x), [torch.empty_like(tensor) for tensor in parameters], residual


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, _, route, objective, kinds, parameters, _, _ = inputs
    ctx.kinds, ctx.has_objective, live = kinds, objective is not None, output[1]
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(x, live, route, *([objective] if objective is not None else []), *parameters)


def _differentiate(ctx: Any, dy: Tensor, _live: Tensor, _power: Tensor, _health: Tensor) -> tuple[Any, ...]:
    x, live, route, *rest = ctx.saved_tensors
    objective, parameters = (rest[0], rest[1:]) if ctx.has_objective else (None, rest)
    dx, grads, _ = branches_backward(x, dy, live, objective, route, ctx.kinds, list(parameters))
    return dx, None, None, None, None, grads, None, None


branches.register_autograd(_differentiate, setup_context=_save)


def kernel_constants(kind: BranchKind, bank: BankTensors, x: Tensor, seeds: int, launch: launch_rules.Launch) -> dict[str, object]:
    """The constants that a kernel is compiled for; none of them changes before a bank doubles."""
    outer, inner, width = x.shape
    chunk = chunk_width(width, seeds)
    padded, even = launch_rules.power_of_two(chunk, 16), width % seeds == 0
    return {
        "C": chunk, "EVEN": even, "FULL": even and chunk == padded and outer * inner % launch.rows == 0, "FLAT": outer == 1,
        "H": bank.hidden, "CP": padded, "HB": launch.hidden, "BM": launch.rows,
        "AFFINE": kind.affine, "BIAS": kind.bias, "GATED": kind.gated, "ACT": kind.activation,
    }  # fmt: skip


def packed_constants(kind: BranchKind, bank: BankTensors, x: Tensor, seeds: int, launch: launch_rules.Launch) -> dict[str, object]:
    """The constants of the kernels for narrow chunks."""
    outer, inner, width = x.shape
    return {
        "C": chunk_width(width, seeds), "EVEN": width % seeds == 0, "WHOLE": outer * inner % launch.rows == 0, "FLAT": outer == 1,
        "H": bank.hidden, "HB": launch.hidden, "G": launch.packed, "W": launch_rules.TILE // launch.packed, "BM": launch.rows,
        "BIAS": kind.bias, "ACT": kind.activation,
    }  # fmt: skip


def packed_launch(x: Tensor, seeds: int, kind: BranchKind, bank: BankTensors, back: bool) -> launch_rules.Launch | None:
    """Launch settings of a kernel for narrow chunks; None where chunks are not narrow, or the branches are affine or gated."""
    if kind.affine or kind.gated:
        return None
    return launch_rules.packed(chunk_width(x.shape[2], seeds), bank.hidden, x.element_size(), seeds, launch_rules.limits(x.device), back)


def forward_launch(x: Tensor, seeds: int, kind: BranchKind, bank: BankTensors, measure: bool) -> launch_rules.Launch:
    """Launch settings of the forward kernel for this site and bank."""
    chunk, hidden = launch_rules.power_of_two(chunk_width(x.shape[2], seeds), 16), launch_rules.power_of_two(bank.hidden, 16)
    return launch_rules.forward(chunk, hidden, kind.gated, kind.affine, x.element_size(), seeds, launch_rules.limits(x.device), measure)


def backward_launch(x: Tensor, seeds: int, kind: BranchKind, bank: BankTensors, objectives: bool) -> launch_rules.Launch:
    """Launch settings of the backward kernels for this site and bank."""
    chunk, hidden = launch_rules.power_of_two(chunk_width(x.shape[2], seeds), 16), launch_rules.power_of_two(bank.hidden, 16)
    return launch_rules.backward(chunk, hidden, kind.gated, kind.affine, x.element_size(), seeds, launch_rules.limits(x.device), objectives)


def input_gradient_launch(x: Tensor, seeds: int, kind: BranchKind, bank: BankTensors, launch: launch_rules.Launch) -> launch_rules.Launch:
    """Launch settings of the kernel for ``dx`` alone, where the backward's ``launch`` splits the hidden units."""
    chunk, hidden = launch_rules.power_of_two(chunk_width(x.shape[2], seeds), 16), launch_rules.power_of_two(bank.hidden, 16)
    return launch_rules.input_gradient(chunk, hidden, kind.gated, x.element_size(), seeds, launch_rules.limits(x.device), launch)
