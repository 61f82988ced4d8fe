"""Keeping what a compiled host's graph reads up to date with the table of branches: see ``esper.seeds.graph_ops``."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from esper.blueprints import Block, SlotBank
from esper.kernels.branch_kinds import KINDS
from esper.kernels.dispatch import chosen_by_hash
from esper.seeds import graph_ops as graph
from esper.seeds.branches import Branch
from esper.seeds.device_copy import on_device
from esper.seeds.fused import FROZEN, SUBTRACT, bank_fits, kind_of
from esper.seeds.graph_ops import GraphSite

if TYPE_CHECKING:
    from esper.seeds.registry import SeedRegistry


class CompiledSites:
    """The graph's side of every site of a registry. It costs nothing until a compiled host asks for it: ``sites`` is empty before.

    From then on every blueprint that the graph can hold and that grew anywhere has a bank of at least two slots at every site that it
    fits, so that the next site at which it germinates compiles nothing.
    """

    def __init__(self, registry: SeedRegistry) -> None:
        self._garden = weakref.ref(registry)
        self.sites: list[GraphSite] = []
        self._alphas = torch.zeros(0)
        self._rows: dict[int, int] = {}
        begin = weakref.WeakMethod(self._begin)
        self.near_zero = 0.0
        for layer in registry.layers:
            layer.number = graph.number_of(lambda: (begin() or _gone)())
            weakref.finalize(layer, graph.forget, layer.number)

    @property
    def registry(self) -> SeedRegistry:
        """Whose sites they are."""
        registry = self._garden()
        assert registry is not None
        return registry

    def refresh(self, numbers: Iterable[int]) -> None:
        """The plans of these sites have changed."""
        changed = sorted(numbers)
        for number in changed:
            self.registry.layers[number].outside = bool(self._split(number)[1])
        if self.sites and changed:
            for number in range(len(self.sites)):  # a blueprint that is new to one site is new to all
                self._hold(number)
            for number in changed:
                self._route(number)
            self.set_alphas()

    def set_alphas(self) -> None:
        """Copy the table's alphas of all branches in the graph, in one copy."""
        if not self.sites:
            return
        values = torch.zeros(self.registry.table.rows)
        if self._rows:
            rows, branches = torch.tensor(list(self._rows)), torch.tensor(list(self._rows.values()))
            values[rows] = self.registry.branches.alpha[branches]
        self._alphas.copy_(on_device(values, self._alphas.device), non_blocking=True)

    def tallies(self) -> list[Tensor]:
        """Of every site, how often each seed's branch was contained, and then, of every site, in how many forwards."""
        return [site.tally for site in self.sites] + [site.forwards for site in self.sites]

    def members(self, number: int) -> dict[int, int]:
        """The branches of a site that are in the graph, by seed."""
        first = self.registry.first_row[number]
        return {row - first: self._rows[row] for row in self._mine(number)}

    def forget_tallies(self) -> None:
        """Count contained forwards anew."""
        if self.sites:
            torch._foreach_zero_([tensor for site in self.sites for tensor in (site.tally, site.forwards)])

    def _mine(self, number: int) -> list[int]:
        first = self.registry.first_row[number]
        return [row for row in self._rows if first <= row < first + self.registry.layers[number].geometry.seeds]

    # --- the start ---

    def _begin(self) -> None:
        registry = self.registry
        device = registry.device
        self._alphas = torch.zeros(registry.table.rows, device=device)
        with torch.no_grad():
            for number, layer in enumerate(registry.layers):
                first, seeds = registry.first_row[number], layer.geometry.seeds
                route = torch.full((seeds, 3), -1, dtype=torch.int32, device=device)
                alpha = self._alphas[first : first + seeds]
                site = GraphSite(layer.geometry, self.near_zero, alpha, route, self._by_kernel(number))
                self.sites.append(site)
                graph.SITES[layer.number] = site
        self.refresh(range(len(self.sites)))

    def _by_kernel(self, number: int) -> bool:
        kernels, name = self.registry.kernels, self.registry.sites[number].name
        if kernels is None or kernels.tripped or not kernels.takes(self.registry.device) or self.registry.device.type == "cpu":
            return False
        return chosen_by_hash("kernel", name, kernels.config.rollout)

    # --- one site ---

    def _split(self, number: int) -> tuple[list[Branch], list[Branch]]:
        """The branches that a site adds, in the graph and outside: all of them, where there is one that cannot be in it."""
        registry = self.registry
        blended = registry.blended(number)
        capable = all(self._capable(number, branch.blueprint) for branch in blended)
        alone = len({branch.row for branch in blended}) == len(blended)
        checked = registry.kernels is not None and registry.kernels.possible and registry.kernels.config.canary > 0.0
        return (blended, []) if capable and alone and not checked else ([], blended)

    def _capable(self, number: int, blueprint: str) -> bool:
        config = self.registry.blueprints[blueprint]
        return not isinstance(config, Block) and kind_of(config) is not None

    def _hold(self, number: int) -> None:
        stacks: list[Tensor] = []
        kinds: list[str] = []
        fits = True
        for blueprint in self._names(number):
            bank = self.registry.bank(number, blueprint)
            assert isinstance(bank, SlotBank)
            bank.reserve(2)  # sizes 0 and 1 are compiled in
            kinds.append(str(kind_of(bank.blueprint)))
            stacks += [bank.stacks[name] for name in KINDS[kinds[-1]].order]
            fits = fits and bank_fits(bank, self.registry.layers[number].geometry)
        self.sites[number].triton = fits and self._by_kernel(number)
        self.sites[number].hold(",".join(kinds), stacks)

    def _names(self, number: int) -> list[str]:
        """Blueprints that grew anywhere and that the graph can hold here."""
        registry = self.registry
        grown = [name for name in registry.blueprints if any(name in layer.banks for layer in registry.layers)]
        return [name for name in grown if self._capable(number, name) and registry.misfit(registry.first_row[number], name) is None]

    def _route(self, number: int) -> None:
        registry, seeds = self.registry, self.registry.layers[number].geometry.seeds
        for row in self._mine(number):
            del self._rows[row]
        names, (inside, _) = self._names(number), self._split(number)
        route = torch.full((seeds, 3), -1, dtype=torch.int32)
        entries = []
        for branch in inside:
            self._rows[branch.row] = branch.id
            bits = (SUBTRACT if branch.residual else 0) | (0 if registry.learns(branch) else FROZEN)
            entries.append([names.index(branch.blueprint), branch.slot, bits])
        if entries:
            route[[branch.seed for branch in inside]] = torch.tensor(entries, dtype=torch.int32)
        self.sites[number].route.copy_(on_device(route, registry.device), non_blocking=True)


def _gone() -> None:
    raise AssertionError("a compiled host outlived its seeds")
