"""Shares out a host's weights among the processes of a training, with FSDP2 (``torch.distributed.fsdp.fully_shard``)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from esper.distributed import Ranks, local


def share_out(host: nn.Module, device: torch.device, ranks: Ranks) -> None:
    """Leave each process its part of every weight of ``host``, in place; the weights are the same on all processes before.

    The blocks of a host gather their weights one after another, as each is called; everything outside of them is gathered for a whole
    pass. They are gathered in float32 in every precision: autocast says which operations compute in another, as in one process.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (ranks.size,))
    for block in _blocks(host):
        fully_shard(block, mesh=mesh)
    fully_shard(host, mesh=mesh)
    ranks.sharded = True


def _blocks(host: nn.Module) -> Iterator[nn.Module]:
    """The modules in the outermost lists and sequences of a host; a list in a list is none that is called, but holds some."""
    for child in host.children():
        if isinstance(child, (nn.ModuleList, nn.Sequential)):
            for block in child:
                if isinstance(block, (nn.ModuleList, nn.ModuleDict)):
                    yield from _blocks(nn.ModuleList([block]))
                elif next(block.parameters(), None) is not None:
                    yield block
        else:
            yield from _blocks(child)


def largest(tensors: list[Tensor], ranks: Ranks) -> float:
    """The largest magnitude in these tensors, on whatever process it is; NaN where one is."""
    parts = [part for part in map(local, tensors) if part.numel()]
    norms = torch._foreach_norm(parts, float("inf")) if parts else [torch.zeros(())]
    mine = float(torch.stack([norm.float() for norm in norms]).max())
    found = ranks.values("the largest weight", mine) if ranks.sharded else [mine]
    return math.nan if any(math.isnan(one) for one in found) else float(max(found))


def length(tensors: Sequence[Tensor], ranks: Ranks) -> Tensor:
    """The L2 norm of all these tensors together, of which each process may hold a part."""
    parts = [part for part in map(local, tensors) if part.numel()]
    norm = torch.stack(torch._foreach_norm(parts)).float().norm() if parts else torch.zeros(())
    if not ranks.sharded:
        return norm
    whole: Tensor = torch.tensor(ranks.values("the size of the update", float(norm))).norm()
    return whole
