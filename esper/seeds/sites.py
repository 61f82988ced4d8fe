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
from esper.seeds.roles import ROLES, is_linear, watching

Forward = Callable[[], Any]


@dataclass
class Site:
    """A module of the host whose output carries seeds."""

    name: str
    module: nn.Module
    geometry: Geometry


@dataclass
class _Seen:
    output: torch.Size
    same_shape: bool


def find_sites(model: nn.Module, match: list[str], per_site: int, forward: Forward, blocks: bool = False) -> list[Site]:
    """Sites of ``model`` that match, in the order of its modules.

    A pattern is a glob over module names, a role (``esper.seeds.roles``) or ``auto``; ``blocks`` makes ``auto`` look for the
    host's residual blocks. ``forward`` runs the model once on a sample batch (evaluation mode, no gradients, RNG kept), so
    that shapes and roles are known.

    Raises UserError for a pattern that matches nothing (it lists the modules there are), and for more seeds than features.
    """
    patterns = _patterns(model, match, blocks)
    if not patterns:
        raise UserError("sites.match=[] names no module, so nothing could grow; give patterns, or auto.")
    named = {name: module for name, module in model.named_modules() if name and not _is_container(module)}
    roles = [pattern for pattern in patterns if pattern in ROLES and pattern not in named]
    for pattern in patterns:
        if pattern not in roles and not any(fnmatchcase(name, pattern) for name in named):
            raise UserError(f"No module of the host matches sites.match '{pattern}'; there are: {', '.join(named) or 'none'}.")
    with watching(model, roles) as found:
        seen = _probe(model, named, forward)
    for role in roles:
        if not found[role]:
            raise UserError(f"sites.match={role} finds no such module in this host; name the modules, or try {' or '.join(ROLES)}.")
    wanted = [name for pattern in patterns for name in found.get(pattern, [pattern])]
    chosen = {name: module for name, module in named.items() if any(fnmatchcase(name, p) for p in wanted)}
    sites = []
    for name, module in chosen.items():
        if name not in seen:
            raise UserError(f"The module '{name}' gives no tensor when the host runs, so no seed can sit there; choose another site.")
        sites.append(Site(name, module, _geometry(name, module, seen[name], per_site)))
    return sites


def _patterns(model: nn.Module, match: list[str], blocks: bool) -> list[str]:
    if list(match) != ["auto"]:
        return list(match)
    if blocks:
        found = [name for name, module in model.named_modules() if name and hasattr(module, "output_layers")]
        if not found:
            raise UserError(
                "blueprint=block with sites.match=auto finds no residual block (a module with an attribute output_layers) "
                "in this host; name the blocks, e.g. sites.match=['blocks.*']."
            )
        return found
    own = list(getattr(model, "growth_sites", ()))
    if own:
        return own
    linear = [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d)) and name]
    if len(linear) < 2:
        raise UserError("sites.match=auto finds no hidden layer in this host; name the modules that may grow, e.g. sites.match=['fc1'].")
    return linear[:-1]


def _is_container(module: nn.Module) -> bool:
    return isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict))


def _probe(model: nn.Module, modules: dict[str, nn.Module], forward: Forward) -> dict[str, _Seen]:
    seen: dict[str, _Seen] = {}

    def remember(name: str) -> Callable[[nn.Module, Any, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, named: Any, output: Any) -> None:
            tensor, source = first_tensor(output), first_tensor(inputs or named)
            if tensor is not None:
                seen[name] = _Seen(tensor.shape, source is not None and source.shape == tensor.shape)

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
    """Evaluation mode without gradients; training flags and the RNG are put back afterwards."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    try:
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            yield
    finally:
        for module, training in flags:
            module.training = training


def _geometry(name: str, module: nn.Module, seen: _Seen, per_site: int) -> Geometry:
    shape = seen.output
    channels_first = len(shape) == 4 or (len(shape) > 2 and any(_is_spatial(part) for part in module.modules()))
    width = shape[1] if channels_first else shape[-1]
    spatial = len(shape) - 2 if channels_first else 0
    if per_site > width:
        raise UserError(f"sites.per_site={per_site} is more than the {width} features of site '{name}'; ask for at most {width}.")
    positions = max(1, shape.numel() // (width * max(1, shape[0])))
    block = seen.same_shape and any(True for _ in module.children())
    return Geometry(width, per_site, 1 if channels_first else -1, spatial, positions, block)


def _is_spatial(module: nn.Module) -> bool:
    """Whether a layer's kind says that its output has channels first."""
    if is_linear(module):  # transformers calls one of its linear layers Conv1D
        return False
    return any(word in type(module).__name__ for word in ("Conv", "BatchNorm", "InstanceNorm", "GroupNorm", "Pool"))
