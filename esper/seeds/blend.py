"""The forward pass of the branches at a site, on plain torch: ``y = x + Σ α·δ(x)``, with every branch contained.

A branch whose δ contains a value that is not finite adds nothing to that forward, is counted, and passes on no gradient, so that it
cannot affect the host. A branch whose code raises an exception adds nothing either (``esper.seeds.branch_exceptions``).
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from esper.blueprints import Geometry
from esper.blueprints.unique_indices import unique_indices
from esper.seeds.branch_exceptions import run_contained
from esper.seeds.branch_groups import BlockGroup, BranchGroups, Group, Injection
from esper.seeds.chunk_access import AddToChunks, ReadChunks, read_chunks
from esper.seeds.fused_group import FusedGroup
from esper.seeds.recording import Recording


def blend(x: Tensor, groups: BranchGroups, geometry: Geometry, recording: Recording | None = None) -> Tensor:
    """``x`` plus the additions of the groups' branches; same shape and dtype.

    A recording that asks for it receives, by branch id, the RMS of ``α·δ`` over that of the chunk (0-dim tensors).
    """
    y, ratios = x, None if recording is None else recording.ratios
    plain: list[Group] = []
    for group in groups:
        if isinstance(group, Group):
            plain.append(group)
        elif isinstance(group, FusedGroup):
            group.forwards += 1
            if group.kernels.suspended:
                plain += group.split()
            else:
                y = group(x, None if recording is None else recording.statistics, ratios)
    if plain:
        y = _add_groups(x, y, plain, geometry, ratios)
    for group in groups:
        if isinstance(group, Injection):
            with unique_indices(y.device):
                y = y.index_add(group.dim, group.target, group.addition.to(y.dtype))
        elif isinstance(group, BlockGroup):
            y = _add_block(x, y, group, geometry, ratios)
            group.forwards += 1
    return y


def chunks_of(x: Tensor, group: Group | BlockGroup, geometry: Geometry) -> Tensor:
    """The chunks to which the group's branches write: ``[A, rows, C]`` (features), ``[A, batch, C, …]`` (spatial) or ``[1, …]`` (block)."""
    if isinstance(group, BlockGroup):
        return x.unsqueeze(0)
    dim = _axis(x, geometry)
    return _to_rows(read_chunks(x, group, dim, geometry.seeds), group, dim)


def _axis(x: Tensor, geometry: Geometry) -> int:
    return geometry.dim if geometry.dim >= 0 else x.dim() - 1


def _to_rows(chosen: Tensor, group: Group, dim: int) -> Tensor:
    """``[…, A, C, …]`` → ``[A, rows, C]``, or ``[A, batch, C, …]`` for a blueprint that sees positions.

    If positions come after the features, they remain the contiguous axis: whole runs are copied, and nothing is transposed.
    """
    branches, width = chosen.shape[dim : dim + 2]
    if group.bank.blueprint.spatial:
        return chosen.transpose(0, 1)
    if dim + 2 < chosen.dim():
        return chosen.movedim((dim, dim + 1), (0, 1)).reshape(branches, width, -1).transpose(1, 2)
    return chosen.reshape(-1, branches, width).transpose(0, 1)


def _from_rows(added: Tensor, x: Tensor, group: Group, dim: int) -> Tensor:
    """The inverse of ``_to_rows``: its result → ``[…, A, C, …]``."""
    if group.bank.blueprint.spatial:
        return added.transpose(0, 1)
    lead = (*x.shape[:dim], *x.shape[dim + 1 :])
    if dim + 1 < x.dim():
        return added.transpose(1, 2).reshape(*added.shape[::2], *lead).movedim((0, 1), (dim, dim + 1))
    return added.transpose(0, 1).reshape(*lead, *added.shape[::2])


def branch_outputs(x: Tensor, group: Group | BlockGroup, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """``(δ, chunk)`` before α, both shaped as ``chunks_of`` says."""
    chunk = chunks_of(x, group, geometry)
    return (_block_output(x, group) if isinstance(group, BlockGroup) else _group_output(x, chunk, group, geometry)), chunk


def _block_output(x: Tensor, group: BlockGroup) -> Tensor:
    devices = [x.device] if x.is_cuda else []
    with torch.random.fork_rng(devices=devices, enabled=group.fork_rng):
        return group.bank.delta(group.slot, _branch_inputs(x.unsqueeze(0), 0, 1).squeeze(0), group.learning).unsqueeze(0)


def _group_output(x: Tensor, chunk: Tensor, group: Group, geometry: Geometry) -> Tensor:
    branches = len(group.branches)
    if group.bank.blueprint.spatial:
        whole = x if group.bank.source is None else group.bank.source.activation.to(x.dtype)
        reads = chunk.transpose(0, 1) if _reads_chunk(group) else whole.unsqueeze(1)
    elif group.bank.source is not None:
        reads = _whole(group.bank.source.activation.to(x.dtype), group.bank.source.activation.dim() - 1)
    else:
        reads = chunk if _reads_chunk(group) else _whole(x, _axis(x, geometry))
    reads = _branch_inputs(reads, 1 if group.bank.blueprint.spatial else 0, branches)
    with torch.set_grad_enabled(torch.is_grad_enabled() and group.learns):
        rows = group.bank.gather(group.slots, group.learning, x.dtype)
    delta = group.bank.blueprint.forward(rows, reads)
    if group.bank.blueprint.spatial:
        delta = delta.transpose(0, 1)
    if group.residual is not None:
        delta = delta - group.residual.to(delta.dtype).view(-1, *([1] * (delta.dim() - 1))) * chunk
    return delta


def _whole(x: Tensor, dim: int) -> Tensor:
    """All features: ``[1, rows, W]``, with the contiguous axis that ``_to_rows`` gives chunks."""
    if dim + 1 < x.dim():
        return x.movedim(dim, 0).reshape(1, x.shape[dim], -1).transpose(1, 2)
    return x.reshape(1, -1, x.shape[dim])


def _reads_chunk(group: Group) -> bool:
    return group.bank.blueprint.receptive_field == "chunk"


def _branch_inputs(reads: Tensor, dim: int, branches: int) -> Tensor:
    """The inputs of the branches along ``dim``. A branch whose gradient is not finite sends none back, and spoils no other's."""
    shape = list(reads.shape)
    shape[dim] = branches
    reads = reads.expand(shape)
    if reads.requires_grad:
        axes = tuple(axis for axis in range(reads.dim()) if axis != dim)
        reads.register_hook(lambda gradient: _finite_gradients(gradient, axes))
    return reads


def _known_finite(x: Tensor) -> bool:
    """Whether one look shows that all of ``x`` is finite: a finite sum has no other summands. Only a CPU can look without waiting."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and math.isfinite(float(x.detach().sum()))


def _finite_gradients(gradient: Tensor | None, axes: tuple[int, ...]) -> Tensor | None:
    if gradient is None or gradient.numel() == 0 or _known_finite(gradient):
        return gradient
    largest = torch.linalg.vector_norm(gradient, ord=float("inf"), dim=axes, keepdim=True)
    return torch.where(torch.isfinite(largest), gradient, torch.zeros((), dtype=gradient.dtype, device=gradient.device))


def _zero_where_not_finite(delta: Tensor, group: Group | BlockGroup) -> Tensor:
    if _known_finite(delta):
        return delta
    finite = torch.isfinite(delta.detach()).flatten(1).all(1)
    group.failures += ~finite
    return torch.where(finite.view(-1, *([1] * (delta.dim() - 1))), delta, torch.zeros((), dtype=delta.dtype, device=delta.device))


def _add_groups(x: Tensor, y: Tensor, groups: list[Group], geometry: Geometry, ratios: dict[int, Tensor] | None) -> Tensor:
    """``y`` plus the additions of the groups for ``x``."""
    dim = _axis(x, geometry)
    through, *chosen = ReadChunks.apply(x, groups, dim, geometry.seeds)  # type: ignore[no-untyped-call]  # torch's apply has no annotations
    additions = []
    for group, chunks in zip(groups, chosen, strict=True):
        chunk = _to_rows(chunks, group, dim)
        delta = run_contained(group, chunk, partial(_group_output, through, chunk, group, geometry))
        added = _zero_where_not_finite(delta, group) * group.alpha.to(delta.dtype).view(-1, *([1] * (delta.dim() - 1)))
        if ratios is not None:
            _note_ratios(ratios, group.branches, added, chunk)
        additions.append(_from_rows(added.to(y.dtype), x, group, dim))
        group.forwards += 1
    blended: Tensor = AddToChunks.apply(through if y is x else y, groups, dim, geometry.seeds, *additions)  # type: ignore[no-untyped-call]
    return blended


def _add_block(x: Tensor, y: Tensor, group: BlockGroup, geometry: Geometry, ratios: dict[int, Tensor] | None) -> Tensor:
    whole = chunks_of(x, group, geometry)
    delta = run_contained(group, whole, partial(_block_output, x, group))
    added = _zero_where_not_finite(delta, group) * group.alpha.to(delta.dtype)
    if ratios is not None:
        _note_ratios(ratios, group.branches, added, whole)
    return y + added.squeeze(0).to(y.dtype)


def _note_ratios(ratios: dict[int, Tensor], branches: list[int], added: Tensor, chunk: Tensor) -> None:
    with torch.no_grad():
        axes = tuple(range(1, added.dim()))
        above = added.detach().float().square().mean(axes)
        below = chunk.detach().float().square().mean(axes)
        values = (above / below.clamp(min=1e-24)).sqrt()
    ratios.update(zip(branches, values.unbind(), strict=True))
