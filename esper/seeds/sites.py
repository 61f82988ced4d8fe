"""Finding sites: which modules of a host match, and the shape of the activations that leave them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from esper.blueprints import Geometry
from esper.blueprints.call import first_tensor
from esper.errors import UserError
from esper.randomness import global_draws_kept
from esper.seeds.roles import ROLES, with_role
from esper.seeds.watching import Watch, watching
from esper.seeds.wrappers import host_modules

Forward = Callable[[], Any]


@dataclass
class Site:
    """A module of the host whose output carries seeds; ``borrowed`` says that its weights serve elsewhere in the host too."""

    name: str
    module: nn.Module
    geometry: Geometry
    borrowed: bool = False


@dataclass
class _Seen:
    output: torch.Size
    axis: int | None
    residual: bool


def find_sites(model: nn.Module, match: list[str], per_site: int, forward: Forward, blocks: bool = False) -> list[Site]:
    """Sites of ``model`` that match, in the order of its modules.

    A pattern is a glob over module names, a role (``esper.seeds.roles``) or ``auto``; ``blocks`` makes ``auto`` look for the
    host's residual blocks. ``forward`` runs the model once on a sample batch (evaluation mode, no gradients, RNG kept), so
    that shapes and roles are known.

    Raises UserError for a pattern that matches nothing (it lists the modules there are), and for more seeds than features.
    """
    modules = host_modules(model)
    patterns = _patterns(model, modules, match, blocks)
    if not patterns:
        raise UserError("sites.match=[] names no module, so nothing could grow; give patterns, or auto.")
    named = {name: module for name, module in modules.items() if not _is_container(module)}
    roles = [pattern for pattern in patterns if pattern in ROLES and pattern not in named]
    for pattern in patterns:
        if pattern not in roles and not any(fnmatchcase(name, pattern) for name in named):
            raise UserError(f"No module of the host matches sites.match '{pattern}'; there are: {', '.join(named) or 'none'}.")
    with watching(model, modules) as watch:
        seen = _probe(model, named, forward, watch)
    found = {role: with_role(role, watch.calls, named) for role in roles}
    for role in roles:
        if not found[role]:
            raise UserError(f"sites.match={role} finds no such module in this host; name the modules, or try {' or '.join(ROLES)}.")
    wanted = [name for pattern in patterns for name in found.get(pattern, [pattern])]
    chosen = {name: module for name, module in named.items() if any(fnmatchcase(name, p) for p in wanted)}
    sites = []
    for name, module in chosen.items():
        if name not in seen:
            raise UserError(f"The module '{name}' gives no tensor when the host runs, so no seed can sit there; choose another site.")
        borrowed = any(id(parameter) in watch.borrowed for parameter in module.parameters(recurse=False))
        sites.append(Site(name, module, _geometry(name, seen[name], per_site), borrowed))
    return sites


def _patterns(model: nn.Module, modules: dict[str, nn.Module], match: list[str], blocks: bool) -> list[str]:
    if list(match) != ["auto"]:
        return list(match)
    if blocks:
        found = [name for name, module in modules.items() if hasattr(module, "output_layers")]
        if not found:
            raise UserError(
                "blueprint=block with sites.match=auto finds no residual block (a module with an attribute output_layers) "
                "in this host; name the blocks, e.g. sites.match=['blocks.*']."
            )
        return found
    own = list(getattr(model, "growth_sites", ()))
    if own:
        return own
    linear = [name for name, module in modules.items() if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d))]
    if len(linear) < 2:
        raise UserError("sites.match=auto finds no hidden layer in this host; name the modules that may grow, e.g. sites.match=['fc1'].")
    return linear[:-1]


def _is_container(module: nn.Module) -> bool:
    return isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict))


def _probe(model: nn.Module, modules: dict[str, nn.Module], forward: Forward, watch: Watch) -> dict[str, _Seen]:
    seen: dict[str, _Seen] = {}

    def remember(name: str) -> Callable[[nn.Module, Any, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, named: Any, output: Any) -> None:
            tensor, source = first_tensor(output), first_tensor(inputs or named)
            if tensor is not None:
                same = source is not None and source.shape == tensor.shape
                block = same and any(True for _ in module.children())
                seen[name] = _Seen(tensor.shape, watch.node(tensor).axis, block)

        return hook

    handles = [module.register_forward_hook(remember(name), with_kwargs=True) for name, module in modules.items()]
    try:
        with quiet_evaluation(model):
            forward()
    finally:
        for handle in handles:
            handle.remove()
    return seen


@contextmanager
def quiet_evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; training flags and the global generators are put back afterwards."""
    flags = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in flags:
            module.training = False  # a host's own train() may do more than set flags, and may not undo it
        with global_draws_kept(), torch.no_grad():
            yield
    finally:
        for module, training in flags:
            module.training = training


def _geometry(name: str, seen: _Seen, per_site: int) -> Geometry:
    shape = seen.output
    axis = seen.axis
    if axis is None:  # nothing that it came from says: images have their channels first, everything else its features last
        axis = 1 if len(shape) > 3 else len(shape) - 1
    first = axis < len(shape) - 1
    if first and axis != 1:
        raise UserError(
            f"The features of the module '{name}' lie on axis {axis} of its output {list(shape)}; seeds need them on the last axis, "
            "or on axis 1 before the positions: choose another site."
        )
    width = shape[axis]
    if per_site > width:
        raise UserError(f"sites.per_site={per_site} is more than the {width} features of site '{name}'; ask for at most {width}.")
    positions = max(1, shape.numel() // (width * max(1, shape[0])))
    return Geometry(width, per_site, 1 if first else -1, len(shape) - 2 if first else 0, positions, seen.residual)
