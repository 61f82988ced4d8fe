"""The registry of a model: its sites, the table of their seeds, the branches that grew, and the groups that its forwards add."""

from __future__ import annotations

import dataclasses
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Generator, nn

from esper.blueprints import BLUEPRINTS, Block, BlockBank, Blueprint, SlotBank, WideConv, Width, unshardable
from esper.distributed.sharding import class_name, is_sharded
from esper.feature_flags import Flags
from esper.kernels import Kernels
from esper.lifecycle import SeedTable, Stage
from esper.lifecycle.history import History
from esper.lifecycle.transitions import BLENDED, LEARNS_FROM_TASK
from esper.randomness import generator
from esper.seeds.branch_groups import BlockGroup, BranchGroups, GroupMember, Injection, build
from esper.seeds.branches import Branch, BranchTable
from esper.seeds.compiled_modules import uncompiled
from esper.seeds.compiled_sites import CompiledSites
from esper.seeds.device_copy import to_device
from esper.seeds.fused_group import fuse
from esper.seeds.layer import SeedLayer, device_of
from esper.seeds.sites import Site, stack_of

AnyBlueprint = Blueprint | Block


class SeedRegistry:
    """Owns everything that is attached to ``model``. Rows of ``table`` are numbered site by site, seed by seed."""

    def __init__(
        self,
        model: nn.Module,
        sites: list[Site],
        blueprint: AnyBlueprint,
        seed: int,
        silent: bool = True,
        kernels: Kernels | None = None,
        flags: Flags | None = None,
    ) -> None:
        self.model = model
        self.sites = sites
        self.blueprints: dict[str, AnyBlueprint] = {name: config() for name, config in BLUEPRINTS.items()}
        self.blueprints[blueprint.name] = blueprint
        self.default_blueprint = blueprint.name
        self.seed = seed
        self.silent = silent
        self.kernels = kernels
        self.flags = flags or (Flags(model=class_name(model)) if kernels is None else kernels.flags)
        self.first_row: list[int] = []
        rows = 0
        for site in sites:
            self.first_row.append(rows)
            rows += site.geometry.seeds
        self.table = SeedTable(rows)
        self.history = History()
        self.branches = BranchTable()
        self.layers = [SeedLayer(site) for site in sites]
        self.by_name = {site.name: number for number, site in enumerate(sites)}
        self.device = device_of(model)
        self.sharded = is_sharded(model)
        self.reseed = False
        """Whether a fossilized seed may germinate again; controllers are told of it."""
        self._changed: set[int] = set()
        self._cached: dict[tuple[Stage, ...] | int, list[Branch]] = {}  # by stages, by site; until the next touch
        self.released: list[Branch] = []
        self._live_groups: list[BranchGroups] = [[] for _ in sites]
        self.compiled = CompiledSites(self)
        for site, layer in zip(sites, self.layers, strict=True):
            layer.to(self.device)
            layer.kernels = kernels
            layer.attach(site.module)
            if site.hidden is not None:
                layer.listen(site.hidden.module)
            elif blueprint.reads_input:
                layer.listen(site.module)

    # --- addresses ---

    def site_of(self, row: int) -> int:
        """Number of the site to which a row belongs."""
        return bisect_right(self.first_row, row) - 1

    def seed_of(self, row: int) -> int:
        """Number of the seed within its site."""
        return row - self.first_row[self.site_of(row)]

    def row(self, site: str, seed: int) -> int | None:
        """Row of a seed, or None where there is none."""
        number = self.by_name.get(site)
        if number is None or not 0 <= seed < self.sites[number].geometry.seeds:
            return None
        return self.first_row[number] + seed

    def branch_at(self, row: int) -> Branch | None:
        """The branch that a seed owns now."""
        branch = int(self.table.branch[row])
        return None if branch < 0 else self.branches[branch]

    def group_of(self, branch: Branch) -> list[Branch]:
        """The living branches that are one decision with this one, itself included, by id."""
        if branch.group < 0:
            return [branch]
        return [other for other in self.branches.living() if other.group == branch.group]

    # --- growing ---

    def misfit(self, row: int, blueprint: str) -> str | None:
        """Why this blueprint cannot grow from this seed, or None."""
        if blueprint not in self.blueprints:
            return f"there is no blueprint '{blueprint}'; there are {', '.join(self.blueprints)}"
        site, config = self.sites[self.site_of(row)], self.blueprints[blueprint]
        geometry = site.geometry
        reason = config.misfit(geometry)
        if reason is None and is_sharded(self.model):
            reason = unshardable(config)
        if reason is None and isinstance(config, Block):
            reason = config.silencing_misfit(site.module)
        if reason is None and isinstance(config, Block) and geometry.seeds != 1:
            reason = f"{blueprint} fills its site, but {geometry.seeds} seeds share this one (sites.per_site=1 is needed)"
        if reason is None and config.reads_input and self.layers[self.site_of(row)].source is None:
            reason = f"{blueprint} grow where they are the run's own blueprint (blueprint={blueprint})"
        return reason or self._in_the_way(site, config.part_of_layer)

    def _in_the_way(self, site: Site, widens: bool) -> str | None:
        """Why a branch cannot grow for those that live beside it, or None: a layer is either widened, or something grows on it."""
        if any(self._widens(branch) is not widens for branch in self.living_at(self.by_name[site.name]) if widens or self._widens(branch)):
            return f"units, heads or ranks of the host and branches of other kinds cannot both grow at '{site.name}'"
        if widens and site.hidden is not None and site.hidden.name in self.by_name:
            others = [branch for branch in self.living_at(self.by_name[site.hidden.name]) if not self._widens(branch)]
            return f"branches that grew on '{site.hidden.name}' would not fit it when it is wider" if others else None
        if not widens:
            for number, other in enumerate(self.sites):
                if other.hidden is not None and other.hidden.module is site.module and any(map(self._widens, self.living_at(number))):
                    return f"'{site.name}' is being widened by what grew at '{other.name}'"
        return None

    def _widens(self, branch: Branch) -> bool:
        return self.blueprints[branch.blueprint].part_of_layer

    def germinate(self, row: int, blueprint: str, strategy: str) -> Branch:
        """Allocate a branch for a seed (its stage is the machine's business). Draws from a generator of this seed's own."""
        site, seed, generation = self.sites[self.site_of(row)], self.seed_of(row), int(self.table.generation[row])
        branch = self._grown(row, blueprint, strategy, generator(self.seed, "blueprint", site.name, seed, generation))
        self.table.branch[row] = branch.id
        return branch

    def germinate_successor(self, branch: Branch, blueprint: str) -> Branch:
        """Allocate a branch that will learn in the place of another, which its seed keeps. Draws from a separate generator."""
        site = self.sites[branch.site]
        draws = generator(self.seed, "successor", site.name, branch.seed, len(self.branches))
        successor = self._grown(branch.row, blueprint, branch.strategy, draws)
        successor.replaces, successor.stage = branch.id, Stage.TRAINING
        return successor

    def _grown(self, row: int, blueprint: str, strategy: str, draws: Generator) -> Branch:
        number, seed = self.site_of(row), self.seed_of(row)
        layer, bank = self.layers[number], self.bank(number, blueprint)
        slot = bank.allocate(seed, draws, self.silent)
        config = self.blueprints[blueprint]
        if isinstance(bank, BlockBank):
            parameters, macs = bank.parameters_of(slot), 0
        else:
            assert isinstance(config, Blueprint)
            parameters, macs = config.parameters(layer.geometry, seed), config.macs(layer.geometry, seed)
        branch = Branch(
            id=len(self.branches),
            site=number,
            row=row,
            seed=seed,
            blueprint=blueprint,
            slot=slot,
            generation=int(self.table.generation[row]),
            strategy=strategy,
            parameters=parameters,
            macs=macs,
            residual=not self.silent and not isinstance(bank, BlockBank),
        )
        self.branches.add(branch)
        self.mark_changed(number)
        return branch

    def release(self, branch: Branch) -> None:
        """End a branch; it stays in the table as a record. Its slot is freed with the next ``refresh``, when no group has it."""
        branch.alive = False
        self.released.append(branch)
        self.mark_changed(branch.site)

    def bank(self, number: int, blueprint: str) -> SlotBank | BlockBank:
        """The bank of a blueprint at a site, made where there is none yet."""
        layer = self.layers[number]
        if blueprint not in layer.banks:
            config = self.blueprints[blueprint]
            if isinstance(config, Block):
                layer.banks[blueprint] = grown = BlockBank(config, stack_of(self.model, self.sites[number].name), self.device)
                grown.source = layer.source if config.reads_input else None
            else:
                layer.banks[blueprint] = bank = SlotBank(self._fitted(config, self.sites[number]), layer.geometry, self.device)
                bank.source = layer.source if config.part_of_layer else None
        return layer.bank(blueprint)

    def _fitted(self, config: Blueprint, site: Site) -> Blueprint:
        """The blueprint as it is at this site: new hidden units are like those of the hidden layer."""
        if not isinstance(config, Width) or site.hidden is None:
            return config
        activation = site.hidden.activation if config.activation == "auto" else config.activation
        if isinstance(site.hidden.module, nn.Linear):
            return dataclasses.replace(config, activation=activation)
        layers, norm = (site.hidden.module, site.module), site.hidden.norm
        paths = tuple((layer.stride, layer.padding, layer.dilation) for layer in layers)
        own = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
        group, eps = (0, 1e-5) if norm is None else (site.hidden.group, norm.eps)
        return WideConv(**own | {"activation": activation}, group=group, eps=eps, paths=paths)

    # --- checkpoints ---

    def topology(self) -> dict[str, Any]:
        """The description that a saved state must match before its tensors are read (JSON-able)."""
        sites = [
            {"name": site.name, "width": site.geometry.width, "seeds": site.geometry.seeds, "dim": site.geometry.dim} for site in self.sites
        ]
        return {"sites": sites, "blueprint": self.default_blueprint, "silent": self.silent}

    def state(self) -> dict[str, Any]:
        """The table of seeds, the branches and their banks, by reference."""
        banks = {layer.name: {name: bank.state() for name, bank in self.banks(n).items()} for n, layer in enumerate(self.layers)}
        return {"table": self.table.state(), "history": self.history.state(), "branches": self.branches.state(), "banks": banks}

    def load(self, state: dict[str, Any]) -> None:
        """Take over a saved state of a registry of the same topology. Raises ValueError where it does not fit."""
        self.table.load(state["table"])
        self.history.load(state.get("history", {}))  # the first versions kept none
        self.branches.load(state["branches"])
        for number, layer in enumerate(self.layers):
            for blueprint, saved in state["banks"][layer.name].items():
                self.bank(number, blueprint).load(saved)
        for branch in self.branches.living():
            bank = self.layers[branch.site].bank(branch.blueprint)
            held = (
                bank.used[branch.slot]
                if isinstance(bank, SlotBank) and branch.slot >= 0
                else str(branch.slot) in getattr(bank, "blocks", ())
            )
            if not held or self.site_of(branch.row) != branch.site or self.seed_of(branch.row) != branch.seed:
                raise ValueError(f"branch {branch.id} has no parameters where it should")
        for number in range(len(self.sites)):
            self.mark_changed(number)
        self.refresh()

    # --- groups ---

    def mark_changed(self, site: int) -> None:
        """Say that the groups of a site must be built again (a stage changed, or a branch came or went)."""
        self._changed.add(site)
        self._cached.clear()

    def refresh(self) -> None:
        """Bring every forward's groups and alphas up to date, and free the slots of ended branches; called once a tick."""
        for branch in self.released:
            self.layers[branch.site].bank(branch.blueprint).free(branch.slot)
        self.released = []
        for number in sorted(self._changed):  # the other sites' groups are up to date
            members = [self.member(branch, self.learns(branch)) for branch in self.blended(number)]
            self._live_groups[number] = self._build_groups(members, number)
            self.layers[number].groups = self._live_groups[number]
        self.compiled.refresh(self._changed)
        self._changed.clear()

    def set_alphas(self, sites: set[int]) -> None:
        """Copy the table's alphas into the groups of these sites."""
        for number in sites:
            for group in self._live_groups[number]:
                assert not isinstance(group, Injection)
                group.alpha.copy_(to_device(self.branches.alpha[group.branches], self.device))
        self.compiled.set_alphas()

    def blended(self, site: int) -> list[Branch]:
        """Living branches of a site that its forward adds: blended, fossilized, or fading out."""
        return [branch for branch in self.living_at(site) if self.adds(branch)]

    def living_at(self, site: int) -> list[Branch]:
        """Living branches of a site, by id."""
        if site not in self._cached:
            for number in range(len(self.sites)):
                self._cached[number] = []
            for branch in self.branches.living():
                self._cached[branch.site].append(branch)
        return self._cached[site]

    def learns(self, branch: Branch) -> bool:
        """Whether the task's gradient reaches a branch's parameters."""
        return branch.stage in LEARNS_FROM_TASK

    def adds(self, branch: Branch) -> bool:
        """Whether its site's forward adds a living branch."""
        fading = branch.stage is Stage.CULLED and float(self.branches.alpha[branch.id]) > 0.0
        return (branch.stage in BLENDED or fading) and not branch.held

    def in_stage(self, *stages: Stage) -> list[Branch]:
        """Living branches in one of these stages, by id. It is the same list, not to be changed, until a stage changes."""
        if stages not in self._cached:
            self._cached[stages] = [branch for branch in self.branches.living() if branch.stage in stages]
        return self._cached[stages]

    def cost_key(self) -> tuple[tuple[str, int, bool], ...]:
        """A key of the MACs that the present groups cost: two registries with equal keys cost the same."""
        return tuple((layer.name, *group.cost_key()) for layer in self.layers for group in layer.groups)

    @contextmanager
    def shadow(self, learning: list[Branch]) -> Iterator[BranchGroups]:
        """Within: forwards with these TRAINING branches on (α = 1, or in another's place) and alone learning; yields their groups."""
        groups: BranchGroups = []
        replaced = {branch.replaces for branch in learning}
        with self._keeping_groups():
            for number, layer in enumerate(self.layers):
                blended = [self.member(branch, learning=False) for branch in self.blended(number) if branch.id not in replaced]
                training = [GroupMember(branch, self._shadow_alpha(branch), True) for branch in learning if branch.site == number]
                layer.groups = self._build_groups(blended, number)
                mine = self._build_groups(training, number)
                for group in mine:
                    assert not isinstance(group, Injection)
                    if isinstance(group, BlockGroup):
                        group.fork_rng = True
                    groups.append(group)
                layer.groups = [*layer.groups, *mine]
            yield groups

    @contextmanager
    def without(self, *branches: Branch) -> Iterator[None]:
        """Within: forwards in which these branches are off, and those that are one decision with them."""
        whole = [member for branch in branches for member in self.group_of(branch)]
        off = {branch.id for branch in whole}
        with self._keeping_groups():
            for number in sorted({branch.site for branch in whole}):
                layer = self.layers[number]
                members = [self.member(b, learning=False) for b in self.blended(number) if b.id not in off]
                layer.groups = self._build_groups(members, number)
            yield

    @contextmanager
    def exchanged(self, off: Branch, on: Branch) -> Iterator[None]:
        """Within: forwards in which ``on`` is in the place of ``off``, at its α."""
        number, alpha = off.site, float(self.branches.alpha[off.id])
        with self._keeping_groups():
            members = [GroupMember(on, alpha, False) if b is off else self.member(b, learning=False) for b in self.blended(number)]
            self.layers[number].groups = self._build_groups(members, number)
            yield

    @contextmanager
    def injecting(self, injections: dict[int, Injection]) -> Iterator[None]:
        """Within: forwards that add the given tensors at the given sites."""
        with self._keeping_groups():
            for number, injection in injections.items():
                self.layers[number].groups = [*self.layers[number].groups, injection]
            yield

    @contextmanager
    def _keeping_groups(self) -> Iterator[None]:
        before = [(layer.groups, layer.recording) for layer in self.layers]
        for layer in self.layers:
            layer.recording = None
        try:
            with uncompiled():
                yield
        finally:
            for layer, (groups, recording) in zip(self.layers, before, strict=True):
                layer.groups, layer.recording = groups, recording

    def _build_groups(self, members: list[GroupMember], number: int) -> BranchGroups:
        """The groups of a site: one for all that the kernels can take, and the rest."""
        geometry = self.layers[number].geometry
        groups = build(members, self.banks(number), geometry, self.device)
        for group in groups:
            group.contained = not self.sharded
        return fuse(
            groups,
            self.sites[number].name,
            geometry,
            {member.branch.id: member.branch.seed for member in members},
            self.kernels,
            self.device,
        )

    def member(self, branch: Branch, learning: bool) -> GroupMember:
        return GroupMember(branch, float(self.branches.alpha[branch.id]), learning)

    def _shadow_alpha(self, branch: Branch) -> float:
        """α of a TRAINING branch in shadow forwards: 1, or that of the branch in whose place it learns."""
        return 1.0 if branch.replaces < 0 else float(self.branches.alpha[branch.replaces])

    def banks(self, number: int) -> dict[str, SlotBank | BlockBank]:
        """The banks of a site, by blueprint."""
        layer = self.layers[number]
        return {name: layer.bank(name) for name in layer.banks}
