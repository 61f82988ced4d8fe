"""From a grown model to a plain one: the same outputs, without esper's machinery and without seeds that never grew.

``export_with_cards`` also describes the modules and their places, so that ``rebuild_branches`` can build them into a fresh host and
a saved state fits it.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from esper.blueprints import BLUEPRINTS, BlockBank, Blueprint, Geometry, LoRA, SlotBank
from esper.blueprints.block import assembled
from esper.blueprints.heads import add_heads, is_attention
from esper.blueprints.plain_modules import plain_net
from esper.seeds.branches import Branch
from esper.seeds.compiled_modules import unwrapped
from esper.seeds.exported_modules import Adapted, Deepened, GrownBlock, GrownBranch, GrownSite
from esper.seeds.folding import fold, foldable, matrix, weight_is_its_own
from esper.seeds.hidden_layers import LAYERS, not_listening, widen
from esper.seeds.layer import ATTRIBUTE, ModelHook, SeedLayer, mark_for_compiler, unmark_for_compiler
from esper.seeds.layer_ranks import add_to_weight, factors
from esper.seeds.registry import SeedRegistry

Card = dict[str, Any]


def export(registry: SeedRegistry) -> nn.Module:
    """A copy of the model without seeds, with every branch that adds to its output folded in or built in as a plain module."""
    return export_with_cards(registry)[0]


def export_with_cards(registry: SeedRegistry) -> tuple[nn.Module, list[Card]]:
    """The plain model, and one JSON-able card for every site at which it differs from the host."""
    inner = [_hooks_before(site.module) for site in registry.sites]
    listening = [site.module if site.hidden is None else site.hidden.module for site in registry.sites]
    with _detached(registry), not_listening(listening), unwrapped(registry.model):
        plain = copy.deepcopy(registry.model)
    cards = []
    modules = [plain.get_submodule(site.name) for site in registry.sites]  # found before any of them is replaced
    with torch.no_grad():
        for number, module in enumerate(modules):
            wide, others = _apart(registry, registry.blended(number))
            if others:
                cards.append(_build_in(registry, number, module, plain, inner[number], others))
            if wide and isinstance(registry.blueprints[wide[0].blueprint], LoRA):
                cards.append(_with_ranks(registry, wide, module, plain, inner[number]))
            else:
                cards += [_widened(registry, branch, module, plain) for branch in wide]
    for parameter in plain.parameters():
        parameter.grad = None
    return plain, cards


def rebuild_branches(host: nn.Module, cards: list[Card], blueprint_of: Any, budget: Any) -> None:
    """Build modules of the shapes that the cards state into a fresh host; their values come from a saved state.

    ``blueprint_of(entry)`` makes the blueprint of a branch's entry; ``budget`` (``esper.export.description``) is asked before each.
    Raises KeyError or AttributeError where the host has no such module.
    """
    modules = [host.get_submodule(card["site"]) for card in cards]
    hidden = [host.get_submodule(card["hidden"]) if "hidden" in card else None for card in cards]
    for card, module, wider in zip(cards, modules, hidden, strict=True):
        if "heads" in card:
            if not is_attention(module):
                raise KeyError(f"'{card['site']}' as an attention layer")
            attention: Any = module
            size = attention.output.in_features // attention.heads * card["heads"]
            budget.spend([(3 * size, attention.qkv.in_features), (attention.output.out_features, size)])
            add_heads(module, card["heads"])
            continue
        if wider is not None:
            if not isinstance(wider, LAYERS) or type(module) is not type(wider):
                raise KeyError(f"'{card['hidden']}' and '{card['site']}' as layers of one kind")
            norm = host.get_submodule(card["norm"]) if card["norm"] else None
            budget.spend([(card["units"], *wider.weight.shape[1:]), (len(module.weight), card["units"], *module.weight.shape[2:])])
            widen(wider, module, card["units"], norm if isinstance(norm, nn.GroupNorm) else None)
            continue
        if "ranks" in card:
            if not card["folded"]:
                shapes = (card["reads"], card["ranks"]), (card["ranks"], card["width"])
                budget.spend(shapes)
                _replace(host, module, _beside(module, *map(torch.zeros, shapes)))
            continue
        if card["folded"]:
            if card["bias"] and module.bias is None:
                weight = module.weight
                assert isinstance(weight, Tensor)
                budget.spend([(card["width"],)])
                module.bias = nn.Parameter(weight.new_zeros(card["width"]))
            continue
        branches = [_empty_branch(card, entry, module, blueprint_of, budget) for entry in card["branches"]]
        _replace(host, module, _joined(module, branches, card["width"], card["dim"]))


def _apart(registry: SeedRegistry, branches: list[Branch]) -> tuple[list[Branch], list[Branch]]:
    """Branches that are hidden units, heads or ranks of the host's own layers, and all others."""
    wide = [registry.blueprints[branch.blueprint].part_of_layer for branch in branches]
    return list(itertools.compress(branches, wide)), [branch for branch, is_wide in zip(branches, wide, strict=True) if not is_wide]


def _widened(registry: SeedRegistry, branch: Branch, module: nn.Module, plain: nn.Module) -> Card:
    """Put a branch's hidden units into the host's own hidden layer."""
    site, bank = registry.sites[branch.site], registry.layers[branch.site].bank(branch.blueprint)
    if isinstance(bank, BlockBank):
        block: Any = bank.plain(branch.slot)
        add_heads(module, block.heads, block, float(registry.branches.alpha[branch.id]))
        return {"site": site.name, "heads": block.heads}
    assert isinstance(bank, SlotBank) and site.hidden is not None and isinstance(module, LAYERS)
    hidden, values = plain.get_submodule(site.hidden.name), bank.values(branch.slot)
    norm = plain.get_submodule(site.hidden.norm_name) if site.hidden.norm is not None else None
    assert isinstance(hidden, LAYERS) and (norm is None or isinstance(norm, nn.GroupNorm))
    rows, columns = values["w1"], float(registry.branches.alpha[branch.id]) * values["w2"]
    if isinstance(module, nn.Linear):
        rows, columns = rows.t(), columns.t()
    widen(hidden, module, len(rows), norm, rows, columns, values)
    return {"site": site.name, "hidden": site.hidden.name, "norm": site.hidden.norm_name, "units": len(rows)}


def _with_ranks(registry: SeedRegistry, branches: list[Branch], module: nn.Module, plain: nn.Module, inner: set[int]) -> Card:
    """Put the ranks of a site's branches into the weight of its layer, or beside it where that weight serves elsewhere too."""
    site, blueprint = registry.sites[branches[0].site], registry.blueprints[branches[0].blueprint]
    assert isinstance(blueprint, LoRA)
    down, up = factors(registry, branches)
    card: Card = {"site": site.name, "ranks": up.shape[0], "reads": down.shape[0], "width": up.shape[1], "folded": False}
    if not (site.read_elsewhere or inner) and weight_is_its_own(module, plain):
        add_to_weight(module, down, blueprint.scaling * up)
        return card | {"folded": True}
    adapted = _beside(module, down, blueprint.scaling * up)
    _move_hooks(module, adapted, inner)
    _replace(plain, module, adapted)
    return card


def _beside(module: nn.Module, down: Tensor, up: Tensor) -> Adapted:
    kind = next(module.parameters())
    return Adapted(module, down, up).to(kind.device, kind.dtype)


def _build_in(registry: SeedRegistry, number: int, module: nn.Module, plain: nn.Module, inner: set[int], blended: list[Branch]) -> Card:
    """Fold or build in ``blended`` branches of a site; ``inner`` are the host's own hooks on the module that run before them."""
    site = registry.sites[number]
    geometry = site.geometry
    card: Card = {"site": site.name, "width": geometry.width, "dim": _dim(geometry), "folded": False}
    blueprints: list[object] = [registry.layers[number].bank(branch.blueprint).blueprint for branch in blended]
    bare = not (site.read_elsewhere or inner or any(branch.residual for branch in blended))
    if bare and foldable(module, plain, blueprints):
        fold(module, [_term(registry, branch) for branch in blended])
        return card | {"folded": True, "bias": module.bias is not None}
    branches = [_as_host(_branch(registry, branch), module) for branch in blended]
    joined = _joined(module, branches, geometry.width, card["dim"])
    _move_hooks(module, joined, inner)
    _replace(plain, module, joined)
    return card | {"branches": [_card(registry, branch) for branch in blended]}


def _joined(module: nn.Module, branches: list[GrownBranch | GrownBlock], width: int, dim: int) -> nn.Module:
    only = branches[0]
    if len(branches) == 1 and isinstance(only, GrownBlock) and only.alpha == 1.0:
        return Deepened(module, only.block)
    return GrownSite(module, branches, width, dim)


def _dim(geometry: Geometry) -> int:
    """The features' axis counted from the end, so that it holds with and without a batch axis."""
    return -1 - geometry.spatial if geometry.dim == 1 else -1


def _term(registry: SeedRegistry, branch: Branch) -> tuple[float, Any]:
    bank = registry.layers[branch.site].bank(branch.blueprint)
    assert not isinstance(bank, BlockBank)
    values = _cut(bank.blueprint, bank.geometry, branch.seed, bank.values(branch.slot))
    return float(registry.branches.alpha[branch.id]), matrix(bank.blueprint, values, bank.geometry, branch.seed)


def _branch(registry: SeedRegistry, branch: Branch) -> GrownBranch | GrownBlock:
    bank = registry.layers[branch.site].bank(branch.blueprint)
    geometry = registry.sites[branch.site].geometry
    alpha = float(registry.branches.alpha[branch.id])
    if isinstance(bank, BlockBank):
        return GrownBlock(bank.plain(branch.slot), geometry.width, _dim(geometry), alpha)
    values = _cut(bank.blueprint, geometry, branch.seed, bank.values(branch.slot))
    return _plain_branch(bank.blueprint, values, geometry, branch.seed, alpha, branch.residual)


def _plain_branch(
    blueprint: Blueprint, values: dict[str, Tensor], geometry: Geometry, seed: int, alpha: float, residual: bool
) -> GrownBranch:
    spatial = geometry.spatial if geometry.dim == 1 else 0
    net, scale = plain_net(blueprint, values, spatial, alpha)
    start, end = geometry.bounds(seed)
    chunk = blueprint.receptive_field == "chunk" and (start, end) != (0, geometry.width)
    return GrownBranch(net, start, end, _dim(geometry), chunk, scale, alpha if residual else 0.0)


def _cut(blueprint: Blueprint, geometry: Geometry, seed: int, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """One slot's parameters without the padding of uneven chunks."""
    start, end = geometry.bounds(seed)
    shapes = blueprint.shapes(blueprint.reads(geometry, end - start), end - start, geometry)
    return {name: values[name][tuple(slice(size) for size in shape)] for name, shape in shapes.items()}


def _card(registry: SeedRegistry, branch: Branch) -> Card:
    bank = registry.layers[branch.site].bank(branch.blueprint)
    geometry = registry.sites[branch.site].geometry
    alpha = float(registry.branches.alpha[branch.id])
    card = {"blueprint": branch.blueprint, "alpha": alpha, "seed": branch.seed, "residual": branch.residual}
    if isinstance(bank, BlockBank):
        return card | {"block": True, "blocks": bank.blueprint.blocks}
    kind = type(bank.blueprint)
    target = "" if kind in BLUEPRINTS.values() else f"{kind.__module__}:{kind.__qualname__}"
    settings = dataclasses.asdict(bank.blueprint)
    place = {field.name: getattr(geometry, field.name) for field in dataclasses.fields(Geometry)}
    return card | {"target": target, "settings": settings, "geometry": place, "block": False}


def _empty_branch(card: Card, entry: Card, module: nn.Module, blueprint_of: Any, budget: Any) -> GrownBranch | GrownBlock:
    if entry["block"]:
        count = int(entry.get("blocks", 1))
        for _ in range(count):
            budget.copy(module)
        return GrownBlock(assembled([copy.deepcopy(module) for _ in range(count)]), card["width"], card["dim"], entry["alpha"])
    blueprint, geometry = blueprint_of(entry), Geometry(**entry["geometry"])
    start, end = geometry.bounds(entry["seed"])
    shapes = blueprint.shapes(blueprint.reads(geometry, end - start), end - start, geometry)
    budget.spend(shapes.values())
    zeros = {name: torch.zeros(shape) for name, shape in shapes.items()}
    return _as_host(_plain_branch(blueprint, zeros, geometry, entry["seed"], entry["alpha"], entry["residual"]), module)


def _as_host(branch: GrownBranch | GrownBlock, module: nn.Module) -> GrownBranch | GrownBlock:
    """The branch on the device and in the dtype of the host's module, where that has parameters."""
    kind = next((p for p in module.parameters() if p.is_floating_point()), None)
    return branch if kind is None else branch.to(kind.device, kind.dtype)


def _replace(model: nn.Module, old: nn.Module, module: nn.Module) -> None:
    """Put ``module`` in the place of ``old``, under every name that the model has for it."""
    names = [other for other, found in model.named_modules(remove_duplicate=False) if found is old]
    for other in names:
        parent, _, child = other.rpartition(".")
        setattr(model.get_submodule(parent), child, module)


def _hooks_before(module: nn.Module) -> set[int]:
    """Keys of the forward hooks that a module calls before its seed layer's."""
    own = (key for key, hook in module._forward_hooks.items() if isinstance(getattr(hook, "__self__", None), SeedLayer))
    first = next(own)
    return set(itertools.takewhile(lambda key: key != first, module._forward_hooks))


def _move_hooks(module: nn.Module, outer: nn.Module, inner: set[int]) -> None:
    """Give ``outer`` the forward hooks that ran after the branches of ``module``: all but the ``inner`` ones, with their flags."""
    for key in [key for key in module._forward_hooks if key not in inner]:
        for kind in ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"):
            held = getattr(module, kind)
            if key in held:
                getattr(outer, kind)[key] = held.pop(key)


@contextmanager
def _detached(registry: SeedRegistry) -> Iterator[None]:
    """Within: the model as if nothing had ever been attached to it; afterwards every hook is in its old place."""
    own = registry.model
    dicts = [own._forward_pre_hooks, own._forward_hooks, own._state_dict_hooks, *(site.module._forward_hooks for site in registry.sites)]
    before = [(hooks, dict(hooks)) for hooks in dicts]
    for hooks in dicts:
        for key in [key for key, hook in hooks.items() if isinstance(getattr(hook, "__self__", hook), (SeedLayer, ModelHook))]:
            del hooks[key]
    for site in registry.sites:
        del site.module._modules[ATTRIBUTE]
        unmark_for_compiler(site.module)
    try:
        yield
    finally:
        for site, layer in zip(registry.sites, registry.layers, strict=True):
            site.module._modules[ATTRIBUTE] = layer
            mark_for_compiler(site.module)
        for hooks, saved in before:
            hooks.clear()
            hooks.update(saved)
