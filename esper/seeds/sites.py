"""Finding sites: which modules of a host match, and the shape of the activations that leave them."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from esper.blueprints import BehindHidden, Geometry, LinearLayer
from esper.blueprints.block_call import first_tensor
from esper.errors import UserError
from esper.randomness import global_draws_kept
from esper.seeds.compiled_modules import host_modules
from esper.seeds.feature_axis import inputs_of, is_linear
from esper.seeds.hidden_layers import LAYERS, HiddenLayer, hidden_layers
from esper.seeds.roles import ROLES, with_role
from esper.seeds.tracing import ForwardTrace, tracing

log = logging.getLogger(__name__)

Forward = Callable[[], Any]

NO_HIDDEN = "sites.match=auto finds no hidden layer in this host"


@dataclass
class Site:
    """A module of the host whose output carries seeds; ``read_elsewhere`` says that its weights serve elsewhere in the host too.

    ``hidden`` is the hidden layer before it, where that was asked for and there is one that can be widened.
    """

    name: str
    module: nn.Module
    geometry: Geometry
    read_elsewhere: bool = False
    hidden: HiddenLayer | None = None


@dataclass
class _Seen:
    output: torch.Size
    axis: int | None
    residual: bool
    changed: bool
    """Whether a forward pre-hook puts something else in the place of what the module is given."""

    @property
    def place(self) -> int:
        """The axis of the features; where nothing says, images have their channels first and everything else its features last."""
        if self.axis is not None:
            return self.axis
        return 1 if len(self.output) > 3 else len(self.output) - 1


def find_sites(
    model: nn.Module, match: list[str], per_site: int, forward: Forward, blocks: bool = False, widths: bool = False, linear: bool = False
) -> list[Site]:
    """Sites of ``model`` that match, in the order of its modules.

    A pattern is a glob over module names, a role (``esper.seeds.roles``) or ``auto``; ``blocks`` makes ``auto`` look for the host's
    residual blocks, ``widths`` for layers behind hidden layers, ``linear`` for linear layers. ``forward`` runs the model once on a
    sample batch (evaluation mode, no gradients, RNG kept), so that shapes and roles are known.

    ``auto`` leaves out modules that cannot carry seeds, and logs them: layers that are never called, since another module reads their
    weights (``nn.MultiheadAttention`` those of its ``out_proj``) or they are unused.

    Raises UserError for a pattern that matches nothing (it lists the modules), for a named module that cannot carry seeds, and for more
    seeds than features.
    """
    modules = host_modules(model)
    auto, hidden = list(match) == ["auto"], False
    patterns = list(match)
    behind: dict[str, HiddenLayer] = {}
    if widths:
        with quiet_evaluation(model):
            behind = hidden_layers(modules, forward)
    if auto and widths:
        patterns = list(behind)
        if not patterns:
            raise UserError("blueprint=width finds no hidden layer that it could widen in this host; choose another blueprint.")
    elif auto:
        patterns, hidden = _automatic(model, modules, blocks, linear)
    if not patterns:
        raise UserError("sites.match=[] names no module, so nothing could grow; give patterns, or auto.")
    named = {name: module for name, module in modules.items() if not _is_container(module)}
    roles = [pattern for pattern in patterns if pattern in ROLES and pattern not in named]
    for pattern in patterns:
        if pattern not in roles and not any(fnmatchcase(name, pattern) for name in named):
            raise UserError(f"No module of the host matches sites.match '{pattern}'; there are: {', '.join(named) or 'none'}.")
    with tracing(model, modules) as trace:
        seen = _probe(model, named, forward, trace)
    found = {role: with_role(role, trace.calls, named) for role in roles}
    for role in roles:
        if not found[role]:
            raise UserError(f"sites.match={role} finds no such module in this host; name the modules, or try {' or '.join(ROLES)}.")
    wanted = [name for pattern in patterns for name in found.get(pattern, [pattern])]
    chosen = [name for name in named if any(fnmatchcase(name, p) for p in wanted)]
    if hidden:  # the last layer that is called gives the host's output
        called = [name for name in chosen if name in seen]
        chosen = [name for name in chosen if name not in called[-1:]]
    reasons = {name: _unfit(name, modules, seen.get(name), trace, linear) for name in chosen}
    _leave_out(reasons, auto)
    sites = []
    for name in chosen:
        if reasons[name] is None:
            read_elsewhere = any(id(parameter) in trace.read_elsewhere for parameter in named[name].parameters(recurse=False))
            geometry = _geometry(name, seen[name], per_site)
            if linear and is_linear(named[name]):
                geometry = LinearLayer(**dataclasses.asdict(geometry), source=inputs_of(named[name]))
            if name in behind:
                geometry = _behind(geometry, behind[name], named[name])
            sites.append(Site(name, named[name], geometry, read_elsewhere, behind.get(name)))
    return sites


def stack_of(model: nn.Module, site: str) -> list[nn.Module]:
    """The blocks of a site's list that are built like the site's, from the first one to the site's own, which is last."""
    modules = host_modules(model)
    own, place = modules[site], site.rpartition(".")[0]
    shapes = _shapes(own)
    stack: list[nn.Module] = []
    for name, module in modules.items():
        if name.rpartition(".")[0] == place and type(module) is type(own) and _shapes(module) == shapes:
            stack.append(module)
        if module is own:
            break
    return stack


def _shapes(module: nn.Module) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in module.named_parameters() if "seed_layer." not in name}


def _leave_out(reasons: dict[str, str | None], auto: bool) -> None:
    """Refuse named modules that cannot carry seeds; of those that ``auto`` found, say which are left out, and refuse if none is left."""
    unfit = {name: reason for name, reason in reasons.items() if reason is not None}
    if not unfit and (reasons or not auto):
        return
    if not auto:
        name, reason = next(iter(unfit.items()))
        raise UserError(f"The module '{name}' cannot carry seeds: {reason}; choose another site.")
    if len(unfit) == len(reasons):
        why = "".join(f" ('{name}': {reason})" for name, reason in list(unfit.items())[:1])
        raise UserError(f"{NO_HIDDEN}{why}; name the modules that may grow, e.g. sites.match=['fc1'].")
    for reason in dict.fromkeys(unfit.values()):
        names = ", ".join(f"'{name}'" for name in unfit if unfit[name] == reason)
        log.warning("sites.match=auto leaves out %s: %s", names, reason)


def _automatic(model: nn.Module, modules: dict[str, nn.Module], blocks: bool, linear: bool) -> tuple[list[str], bool]:
    """The patterns for ``auto``, and whether they are all the layers of the host, of which the last is not hidden."""
    if blocks:
        found = [name for name, module in modules.items() if hasattr(module, "output_layers")]
        if not found:
            raise UserError(
                "blueprint=block with sites.match=auto finds no residual block (a module with an attribute output_layers) "
                "in this host; name the blocks, e.g. sites.match=['blocks.*']."
            )
        return found, False
    own = [] if linear else list(getattr(model, "growth_sites", ()))
    if own:
        return own, False
    layers = [name for name, module in modules.items() if (is_linear(module) if linear else isinstance(module, LAYERS))]
    if len(layers) < 2:
        raise UserError(f"{NO_HIDDEN}; name the modules that may grow, e.g. sites.match=['fc1'].")
    return layers, True


def _unfit(name: str, modules: dict[str, nn.Module], seen: _Seen | None, trace: ForwardTrace, linear: bool) -> str | None:
    """Why a module cannot carry seeds, or None."""
    if seen is None:
        module = modules[name]
        if module in trace.called:
            return "it gives no tensor when the host runs"
        if any(id(parameter) in trace.read_elsewhere for parameter in module.parameters()):
            parent = name.rpartition(".")[0]
            reader = type(modules[parent]).__name__ if parent in modules else "the host"
            return f"{reader} reads its weights and never calls it, so what grew there would not be felt"
        return "it is not called when the host runs"
    if linear and seen.changed:
        return "a forward pre-hook changes what it reads, and ranks beside its weight would not read the same"
    shape, axis = seen.output, seen.place
    if axis < len(shape) - 1 and axis != 1:
        return (
            f"its features lie on axis {axis} of its output {list(shape)}; seeds need them on the last axis, "
            "or on axis 1 before the positions"
        )
    return None


def _is_container(module: nn.Module) -> bool:
    return isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict))


def _probe(model: nn.Module, modules: dict[str, nn.Module], forward: Forward, trace: ForwardTrace) -> dict[str, _Seen]:
    seen: dict[str, _Seen] = {}
    given: dict[str, Tensor | None] = {}

    def arrive(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, named: Any) -> None:
            given[name] = first_tensor(inputs or named)

        return hook

    def remember(name: str) -> Callable[[nn.Module, Any, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, named: Any, output: Any) -> None:
            tensor, source = first_tensor(output), first_tensor(inputs or named)
            if tensor is not None:
                same = source is not None and source.shape == tensor.shape
                block = same and any(True for _ in module.children())
                seen[name] = _Seen(tensor.shape, trace.node(tensor).axis, block, given.pop(name, None) is not source)

        return hook

    handles = [module.register_forward_hook(remember(name), with_kwargs=True) for name, module in modules.items()]
    handles += [module.register_forward_pre_hook(arrive(name), with_kwargs=True, prepend=True) for name, module in modules.items()]
    try:
        with quiet_evaluation(model):
            forward()
    finally:
        for handle in handles:
            handle.remove()
    return seen


@contextmanager
def quiet_evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; training flags and the global generators are put back afterwards.

    Attention takes its ordinary path: torch's fast path reads layers instead of calling them, and its nested tensors have no shape.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    flags = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in flags:
            module.training = False  # a host's own train() may do more than set flags, and may not undo it
        with global_draws_kept(), torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for module, training in flags:
            module.training = training


def _geometry(name: str, seen: _Seen, per_site: int) -> Geometry:
    shape, axis = seen.output, seen.place
    first, width = axis < len(shape) - 1, shape[axis]
    if per_site > width:
        raise UserError(f"sites.per_site={per_site} is more than the {width} features of site '{name}'; ask for at most {width}.")
    positions = max(1, shape.numel() // (width * max(1, shape[0])))
    return Geometry(width, per_site, 1 if first else -1, len(shape) - 2 if first else 0, positions, seen.residual)


def _behind(geometry: Geometry, hidden: HiddenLayer, reader: nn.Module) -> Geometry:
    layer = hidden.module
    facts: dict[str, Any] = {**dataclasses.asdict(geometry), "activation": hidden.activation, "bias": layer.bias is not None}
    if isinstance(layer, nn.Linear):
        return BehindHidden(**facts, source=layer.in_features)
    assert isinstance(reader, (nn.Conv1d, nn.Conv2d))
    group = 0 if hidden.norm is None else hidden.group
    return BehindHidden(**facts, source=layer.in_channels, kernels=(layer.kernel_size, reader.kernel_size), group=group)
