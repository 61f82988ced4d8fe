"""A second set of a compiled host's sites, for shadow forwards: TRAINING branches are blended in, and they alone learn.

The graph reaches its tensors through ``graph_ops.SITES``, so another set of them goes through the same code. The host's parameters want
no gradient meanwhile: torch compiles that case once more, and its backward pass does only the work that the branches need.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from esper.seeds import graph_ops as graph
from esper.seeds.device_copy import tensor_on, to_device
from esper.seeds.graph_ops import GraphSite

if TYPE_CHECKING:
    from esper.seeds.branches import Branch
    from esper.seeds.compiled_sites import CompiledSites
    from esper.seeds.registry import SeedRegistry


@dataclass(eq=False)
class ShadowSites:
    """The sites of one shadow forward, as long as no group changes.

    ``alphas`` float32 ``[rows]``, of which those at ``own`` are 1; ``parameters``, the stacks that learn with the tensor that stands for
    each in the graph; ``learning``, by site the seeds that learn and their branches; ``key``, on which the MACs depend.
    """

    sites: list[GraphSite]
    alphas: Tensor
    own: Tensor
    parameters: list[tuple[nn.Parameter, Tensor]]
    learning: dict[int, dict[int, int]]
    key: tuple[tuple[str, str, bool, int], ...]

    def failures(self) -> Tensor:
        """In how many forwards each branch that learns was contained since the last call, ``[branches]`` in the order of ``learning``."""
        found = torch.cat([self.sites[number].contained for number in self.learning])
        torch._foreach_zero_([site.contained for site in self.sites])
        return found

    def branches(self) -> dict[int, int]:
        """Every branch that learns, by its place in ``failures``."""
        first = 0
        found: dict[int, int] = {}
        for number, seeds in self.learning.items():
            found |= {first + seed: branch for seed, branch in seeds.items()}
            first += self.sites[number].geometry.seeds
        return found


def shadow_sites(compiled: CompiledSites, training: list[Branch]) -> ShadowSites | None:
    """The sites for these TRAINING branches; None if the graph cannot hold one of them, or two of them on one chunk."""
    registry = compiled.registry
    if compiled.backend is None or compiled.leaves_graph or not all(compiled.way(branch.blueprint) for branch in training):
        return None
    replaced = {branch.replaces for branch in training if branch.replaces >= 0}
    if not all(compiled.way(registry.branches[branch].blueprint) for branch in replaced):
        return None
    blended = [b for number in range(len(registry.layers)) for b in registry.blended(number) if b.id not in replaced]
    rows = [branch.row for branch in (*blended, *training)]
    if len(set(rows)) != len(rows):
        return None
    alphas = torch.zeros(registry.table.rows, device=registry.device)
    sites, learning = [], {}
    for number, layer in enumerate(registry.layers):
        members = [(b, False) for b in blended if b.site == number] + [(b, True) for b in training if b.site == number]
        sites.append(_site(compiled, number, alphas[registry.first_row[number] :][: layer.geometry.seeds], members))
        if any(learns for _, learns in members):
            learning[number] = {branch.seed: branch.id for branch, learns in members if learns}
    parameters = _parameters(compiled, {(branch.site, branch.blueprint) for branch in training})
    counts: dict[tuple[str, str, bool], int] = {}
    for branch, learns in [(b, False) for b in blended] + [(b, True) for b in training]:
        kind = registry.sites[branch.site].name, branch.blueprint, learns
        counts[kind] = counts.get(kind, 0) + 1
    own = tensor_on([branch.row for branch in training if branch.replaces < 0], registry.device).long()
    return ShadowSites(sites, alphas, own, parameters, learning, tuple((*kind, count) for kind, count in sorted(counts.items())))


def _parameters(compiled: CompiledSites, banks: set[tuple[int, str]]) -> list[tuple[nn.Parameter, Tensor]]:
    """The stacks of these banks, each with its tensor in the graph."""
    found = []
    for number, blueprint in sorted(banks):
        leaves = {id(stack): leaf for stack, leaf in compiled.sites[number].leaves}
        found += [(stack, leaves[id(stack)]) for stack in compiled.registry.bank(number, blueprint).parameters()]
    return found


def _site(compiled: CompiledSites, number: int, alpha: Tensor, members: list[tuple[Branch, bool]]) -> GraphSite:
    live, device = compiled.sites[number], compiled.registry.device
    routes = {way: to_device(route, device) for way, route in compiled.routes(number, members).items()}
    site = GraphSite(live.geometry, live.near_zero, alpha, routes["chunk"], routes["layer"], routes["traced"], live.triton)
    site.kinds, site.parameters, site.layer_kinds, site.layer_parameters = (
        live.kinds,
        live.parameters,
        live.layer_kinds,
        live.layer_parameters,
    )
    site.traced, site.block = live.traced, live.block
    return site


@contextmanager
def in_shadow(registry: SeedRegistry, shadow: ShadowSites) -> Iterator[None]:
    """Within: a compiled forward is a shadow forward, and only the branches that learn want a gradient."""
    compiled, layers = registry.compiled, registry.layers
    flags = [(layer.telemetry_due, layer.keeps_activation, layer.asleep) for layer in layers]
    wanting = [parameter for parameter in registry.model.parameters() if parameter.requires_grad]
    shadow.alphas.copy_(compiled.alphas).index_fill_(0, shadow.own, 1.0)
    try:
        for layer, site in zip(layers, shadow.sites, strict=True):
            graph.SITES[layer.graph_number] = site
            layer.telemetry_due = layer.keeps_activation = layer.asleep = layer.ran_eagerly = False
        for parameter in wanting:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in wanting:
            parameter.requires_grad_(True)
        for layer, site, (layer.telemetry_due, layer.keeps_activation, layer.asleep) in zip(layers, compiled.sites, flags, strict=True):
            graph.SITES[layer.graph_number] = site
