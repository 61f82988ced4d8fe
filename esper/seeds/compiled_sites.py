"""The tensors that a compiled host's graph reads, kept up to date with the table of branches: see ``esper.seeds.graph_ops``."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from esper.blueprints import BLUEPRINTS, Block, BlockBank, SlotBank
from esper.kernels.branch_kinds import KINDS
from esper.seeds import graph_ops as graph
from esper.seeds.blocks_in_graph import GraphBlock
from esper.seeds.compiled_modules import backend_at_work
from esper.seeds.device_copy import to_device
from esper.seeds.fused_group import FROZEN, SUBTRACT, bank_fits, layer_or_chunk_kind
from esper.seeds.graph_ops import Bank, GraphSite
from esper.seeds.shadow_sites import ShadowSites, shadow_sites

if TYPE_CHECKING:
    from esper.seeds.branches import Branch
    from esper.seeds.registry import SeedRegistry

Way = Literal["chunk", "layer", "traced"]
"""How the graph computes a bank: by the kernels, by products over the layer, or by tracing the blueprint's own function."""


class CompiledSites:
    """The graph's side of every site of a registry. It costs nothing until a compiled host asks for it: ``sites`` is empty before.

    From then on every blueprint that the graph can hold and that grew anywhere has a bank of at least two slots at every site that it
    fits, so that the next site at which it germinates compiles nothing.
    """

    def __init__(self, registry: SeedRegistry) -> None:
        self._registry = weakref.ref(registry)
        self.sites: list[GraphSite] = []
        self.alphas = torch.zeros(0)
        self._members: list[dict[int, int]] = []
        self._blocks: dict[int, GraphBlock] = {}
        self.backend: Any = None
        """What compiles the host; None where torch does not tell."""
        self._shadow: tuple[list[Branch], ShadowSites | None] | None = None
        self._where: tuple[Tensor, Tensor] = torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
        begin = weakref.WeakMethod(self._begin)
        self.near_zero = 0.0
        self.leaves_graph = False
        for layer in registry.layers:
            layer.graph_number = graph.register_layer(lambda: (begin() or _gone)())
            weakref.finalize(layer, graph.unregister_layer, layer.graph_number)

    @property
    def registry(self) -> SeedRegistry:
        """Whose sites they are."""
        registry = self._registry()
        assert registry is not None
        return registry

    def refresh(self, numbers: Iterable[int]) -> None:
        """Update the graph's tensors, since the groups of these sites have changed.

        The graph breaks at all sites or at none, so that the host is compiled once for it and not site by site.
        """
        numbers = sorted(numbers)
        if not numbers:
            return
        self._shadow = None
        registry, leaves = self.registry, self._must_leave_graph()
        changed = numbers if leaves == self.leaves_graph else list(range(len(registry.layers)))
        self.leaves_graph = leaves
        for layer in registry.layers:
            layer.leaves_graph = leaves
        if self.sites:
            for number in range(len(self.sites)):  # a blueprint that is new to one site is new to all
                self._set_parameters(number)
            for number in changed:
                self._route(number)
            self._blocks = {branch: block for branch, block in self._blocks.items() if registry.branches[branch].alive}
            for branch, block in self._blocks.items():  # outside the graph too, where its parameters keep their hooks
                block.learning = registry.learns(registry.branches[branch])
            first = self.registry.first_row
            rows = [first[number] + seed for number, members in enumerate(self._members) for seed in members]
            branches = [branch for members in self._members for branch in members.values()]
            self._where = torch.tensor(rows, dtype=torch.int64), torch.tensor(branches, dtype=torch.int64)
            self.set_alphas()

    def set_alphas(self) -> None:
        """Copy the table's alphas of all branches in the graph, in one copy."""
        if not self.sites:
            return
        rows, branches = self._where
        values = torch.zeros(self.registry.table.rows).index_copy_(0, rows, self.registry.branches.alpha[branches])
        self.alphas.copy_(to_device(values, self.alphas.device), non_blocking=True)

    def containment_counts(self) -> list[Tensor]:
        """Of every site, how often each seed's branch was contained, and then, of every site, in how many forwards."""
        return [site.contained for site in self.sites] + [site.forwards for site in self.sites]

    def members(self, number: int) -> dict[int, int]:
        """The branches of a site that are in the graph, by seed."""
        return self._members[number]

    def reset_counts(self) -> None:
        """Reset the counts of contained forwards."""
        if self.sites:
            torch._foreach_zero_([tensor for site in self.sites for tensor in (site.contained, site.forwards)])

    # --- the start ---

    def _begin(self) -> None:
        registry = self.registry
        self.backend = backend_at_work()
        device = registry.device
        self.alphas = torch.zeros(registry.table.rows, device=device)
        self._members = [{} for _ in registry.layers]
        with torch.no_grad():
            for number, layer in enumerate(registry.layers):
                first, seeds = registry.first_row[number], layer.geometry.seeds
                route = torch.full((seeds, 3), -1, dtype=torch.int32, device=device)
                alpha = self.alphas[first : first + seeds]
                site = GraphSite(layer.geometry, self.near_zero, alpha, route, route.clone(), route.clone(), self._by_kernel(number))
                self.sites.append(site)
                graph.SITES[layer.graph_number] = site
        self.refresh(range(len(self.sites)))

    def _by_kernel(self, number: int) -> bool:
        kernels, name = self.registry.kernels, self.registry.sites[number].name
        if kernels is None or not kernels.usable_on(self.registry.device) or self.registry.device.type == "cpu":
            return False
        return kernels.flags.on("kernels", name)

    # --- one site ---

    def _must_leave_graph(self) -> bool:
        """Whether something lives that cannot be in the graph: a branch of another kind, a second one on a chunk, or a canary."""
        registry, kernels = self.registry, self.registry.kernels
        if kernels is not None and kernels.available and kernels.config.canary > 0.0:
            return True
        for number in range(len(registry.layers)):
            living = registry.living_at(number)
            if not all(self.way(name) or self._as_a_block(number, name) for name in {branch.blueprint for branch in living}):
                return True
            blended = [branch.row for branch in living if registry.adds(branch)] if len(living) > 1 else []
            if len(set(blended)) != len(blended):
                return True
        return False

    def _as_a_block(self, number: int, blueprint: str) -> bool:
        """Whether the graph can hold a block of this blueprint here: one that reads what the site gives and has parameters of its own."""
        config = self.registry.blueprints[blueprint]
        if not isinstance(config, Block) or config.part_of_layer or config.reads_input or config.start == "shared":
            return False
        return self.registry.layers[number].geometry.seeds == 1

    def way(self, blueprint: str) -> Way | None:
        """How the graph can hold branches of this blueprint, all those of a bank as one tensor."""
        config = self.registry.blueprints[blueprint]
        if isinstance(config, Block) or config.part_of_layer or type(config) is not BLUEPRINTS.get(config.name):
            return None
        kind = layer_or_chunk_kind(config)
        if kind is None or (KINDS[kind].affine and config.receptive_field == "layer"):
            return "traced"
        return "layer" if config.receptive_field == "layer" else "chunk"

    def _way_of(self, blueprint: str) -> Way:
        way = self.way(blueprint)
        assert way is not None
        return way

    def _set_parameters(self, number: int) -> None:
        handed: dict[Way, list[Bank]] = {"chunk": [], "layer": []}
        traced, fits = [], True
        for blueprint in self._names(number):
            bank = self.registry.bank(number, blueprint)
            assert isinstance(bank, SlotBank)
            bank.reserve(2)  # sizes 0 and 1 are compiled in
            way = self.way(blueprint)
            if way in handed:
                kind = str(layer_or_chunk_kind(bank.blueprint))
                handed[way].append((kind, [bank.stacks[name] for name in KINDS[kind].stack_names]))
                fits = fits and (way == "layer" or bank_fits(bank, self.registry.layers[number].geometry))
            else:
                traced.append((bank.blueprint, dict(bank.stacks)))
        self.sites[number].triton = fits and self._by_kernel(number)
        self.sites[number].set_parameters(handed["chunk"], handed["layer"], traced)

    def _names(self, number: int) -> list[str]:
        """Blueprints that grew anywhere and that the graph can hold here."""
        registry = self.registry
        grown = [name for name in registry.blueprints if any(name in layer.banks for layer in registry.layers)]
        return [name for name in grown if self.way(name) and registry.misfit(registry.first_row[number], name) is None]

    def _route(self, number: int) -> None:
        registry = self.registry
        inside = [] if self.leaves_graph else registry.blended(number)
        self._members[number] = {branch.seed: branch.id for branch in inside}
        self.sites[number].block = next((self._block(branch) for branch in inside if self._as_a_block(number, branch.blueprint)), None)
        site = self.sites[number]
        targets: dict[Way, Tensor] = {"chunk": site.route, "layer": site.layer_route, "traced": site.traced_route}
        for way, route in self.routes(number, [(branch, registry.learns(branch)) for branch in inside]).items():
            targets[way].copy_(to_device(route, registry.device), non_blocking=True)

    def routes(self, number: int, members: list[tuple[Branch, bool]]) -> dict[Way, Tensor]:
        """Routes int32 ``[S, 3]``, on the CPU, for these branches of a site; of each is said whether it learns."""
        banks: dict[Way, list[str]] = {"chunk": [], "layer": [], "traced": []}
        for name in self._names(number):
            banks[self._way_of(name)].append(name)
        entries: dict[Way, dict[int, list[int]]] = {way: {} for way in banks}
        for branch, learns in members:
            if self.way(branch.blueprint) is not None:  # not a block
                way, bits = self._way_of(branch.blueprint), (SUBTRACT if branch.residual else 0) | (0 if learns else FROZEN)
                entries[way][branch.seed] = [banks[way].index(branch.blueprint), branch.slot, bits]
        found = {way: torch.full((self.registry.layers[number].geometry.seeds, 3), -1, dtype=torch.int32) for way in banks}
        for way, of in entries.items():
            if of:
                found[way][list(of)] = torch.tensor(list(of.values()), dtype=torch.int32)
        return found

    def shadow(self, training: list[Branch]) -> ShadowSites | None:
        """The sites for a shadow forward of these TRAINING branches; None where no host is compiled, or where they leave its graph."""
        if self._shadow is None or self._shadow[0] != training:
            self._shadow = list(training), shadow_sites(self, training)
        return self._shadow[1]

    def _block(self, branch: Branch) -> GraphBlock:
        bank = self.registry.bank(branch.site, branch.blueprint)
        assert isinstance(bank, BlockBank)
        if branch.id not in self._blocks:
            block = bank.blocks[str(branch.slot)]
            for tensor in (*block.parameters(), *block.buffers()):
                graph.stays_where_it_is(tensor)
            self._blocks[branch.id] = GraphBlock(branch.seed, block)
        return self._blocks[branch.id]


def _gone() -> None:
    raise AssertionError("a compiled host outlived its seeds")
