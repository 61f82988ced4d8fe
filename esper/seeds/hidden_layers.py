"""Hidden layers of a host that can be widened: found by what they compute, listened to, and widened in an exported model."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from esper.blueprints.block_call import first_tensor
from esper.blueprints.width import ACTIVATIONS

BETWEEN = 4
"""Layers and norms called last among which a layer's hidden layer is looked for."""


Layer = nn.Linear | nn.Conv1d | nn.Conv2d
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d)


@dataclass(frozen=True)
class HiddenLayer:
    """A layer of the host whose activation, normalized by ``norm`` before where there is one, one other layer of its kind reads."""

    name: str
    module: Layer
    activation: str
    norm: nn.GroupNorm | None = None
    norm_name: str = ""

    @property
    def group(self) -> int:
        """Channels that can be added one by one: 1, or those of a normalization group."""
        return 1 if self.norm is None else self.norm.num_channels // self.norm.num_groups


def hidden_layers(modules: dict[str, nn.Module], forward: Callable[[], Any]) -> dict[str, HiddenLayer]:
    """By the name of the layer that reads it, every hidden layer: what goes into that layer *is* an activation of its output.

    The model runs in evaluation mode, so dropout between them does nothing. Layers that share a weight with another module, run more than
    once, or whose output serves elsewhere too, are left out.
    """
    layers: dict[str, Layer] = {name: module for name, module in modules.items() if _is_plain(module)}  # type: ignore[misc]
    norms = {name: module for name, module in modules.items() if type(module) is nn.GroupNorm and module.affine}
    holders = [id(parameter) for module in modules.values() for parameter in module._parameters.values() if parameter is not None]
    calls: dict[str, int] = dict.fromkeys((*layers, *norms), 0)
    recent: deque[tuple[str, str, Tensor]] = deque(maxlen=BETWEEN)
    found: dict[str, HiddenLayer] = {}

    def note(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            calls[name] += 1
            for other, norm, values in list(recent):
                if name in norms and not norm and values.shape == inputs[0].shape and torch.equal(values, inputs[0]):
                    recent.append((other, name, output.detach().clone()))
                activation = _activation_of(values, inputs[0])
                if name in layers and activation is not None and type(layers[other]) is type(module):
                    between = norms[norm] if norm else None
                    found[name] = HiddenLayer(other, layers[other], activation, between, norm)
            if name in layers:
                recent.append((name, "", output.detach().clone()))  # the host may go on in place

        return hook

    handles = [module.register_forward_hook(note(name)) for name, module in (*layers.items(), *norms.items())]
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    held = {**layers, **norms}
    once = {name for name, count in calls.items() if count == 1 and holders.count(id(held[name].weight)) == 1} | {""}
    candidates = {name: hidden for name, hidden in found.items() if {name, hidden.name, hidden.norm_name} <= once}
    pairs = {name: (hidden, layers[name]) for name, hidden in candidates.items()}
    if not pairs or _bear_more(list(pairs.values()), forward):
        return candidates
    return {name: hidden for name, hidden in candidates.items() if _bear_more([pairs[name]], forward)}


def _is_plain(module: nn.Module) -> bool:
    if type(module) in (nn.Conv1d, nn.Conv2d):
        return bool(module.groups == 1 and module.padding_mode == "zeros")
    return type(module) is nn.Linear


def _bear_more(pairs: list[tuple[HiddenLayer, Layer]], forward: Callable[[], Any]) -> bool:
    """Whether the host gives what it gave with more units in these hidden layers, which nothing is read from."""
    before = forward()
    modules = [part for hidden, reader in pairs for part in (hidden.module, reader, hidden.norm) if part is not None]
    kept = [
        (module, dict(module._parameters), {name: getattr(module, name) for name in _SIZES if hasattr(module, name)}) for module in modules
    ]
    try:
        for hidden, reader in pairs:
            rows, columns = hidden.module.weight[: hidden.group], reader.weight[:, : hidden.group]
            widen(hidden.module, reader, hidden.group, hidden.norm, rows.detach(), torch.zeros_like(columns))
        after = forward()
    except Exception:  # whatever a host's own code says to another width
        return False
    finally:
        for module, parameters, sizes in kept:
            module._parameters.update(parameters)
            for name, size in sizes.items():
                setattr(module, name, size)
    alike = before.shape == after.shape if isinstance(before, Tensor) and isinstance(after, Tensor) else before is None
    return bool(alike and (before is None or torch.allclose(before, after, rtol=1e-3, atol=1e-5)))


_SIZES = ("in_features", "out_features", "in_channels", "out_channels", "num_channels", "num_groups")


def _activation_of(values: Tensor, given: Tensor) -> str | None:
    """Which activation of ``values`` is ``given``, None where none is."""
    if values.shape != given.shape or not bool((values < 0).any()):  # of positive numbers a ReLU cannot be told from nothing
        return None
    return next((name for name, function in ACTIVATIONS.items() if torch.allclose(function(values), given, rtol=1e-4, atol=1e-6)), None)


class Source:
    """Hears what a hidden layer reads in a forward, until the site behind it has used it."""

    def __init__(self, module: nn.Module | None = None) -> None:
        self.activation: Tensor | None = None
        self._handle = None if module is None else module.register_forward_pre_hook(self.hear, with_kwargs=True)

    def hear(self, module: nn.Module, inputs: Any, named: Any) -> None:
        """A forward pre-hook."""
        self.activation = first_tensor(inputs or named)

    def forget(self) -> None:
        """The forward has gone past the site."""
        self.activation = None

    def __deepcopy__(self, memo: Any) -> Source:
        """A copy of a model listens anew, if at all."""
        return Source()


@contextmanager
def not_listening(modules: list[nn.Module]) -> Iterator[None]:
    """Within: no ``Source`` hangs on these modules."""
    before = [(module, dict(module._forward_pre_hooks)) for module in modules]
    for module in modules:
        for key in [key for key, hook in module._forward_pre_hooks.items() if isinstance(getattr(hook, "__self__", None), Source)]:
            del module._forward_pre_hooks[key]
    try:
        yield
    finally:
        for module, hooks in before:
            module._forward_pre_hooks.clear()
            module._forward_pre_hooks.update(hooks)


def widen(
    hidden: Layer,
    reader: Layer,
    units: int,
    norm: nn.GroupNorm | None = None,
    rows: Tensor | None = None,
    columns: Tensor | None = None,
    vectors: dict[str, Tensor] | None = None,
) -> None:
    """Give ``hidden`` ``units`` more outputs and ``reader`` as many inputs, and ``norm`` between them as many channels, in place.

    ``rows`` ``[units, Cin, …]`` and ``columns`` ``[C, units, …]`` are their weights, ``vectors`` the new units' ``b1``, ``norm_scale`` and
    ``norm_shift`` (None: zeros, ones for a scale). Where a layer has been widened from its other side already, the new units know nothing
    of the units that came so.
    """
    vectors = vectors or {}
    with torch.no_grad():
        wide, long = (
            hidden.weight.new_zeros(units, *hidden.weight.shape[1:]),
            reader.weight.new_zeros(len(reader.weight), units, *reader.weight.shape[2:]),
        )
        if rows is not None and columns is not None:
            wide[:, : rows.shape[1]] = rows
            long[: len(columns)] = columns
        hidden.weight = nn.Parameter(torch.cat([hidden.weight, wide]))
        reader.weight = nn.Parameter(torch.cat([reader.weight, long], 1))
        _lengthen(hidden, "bias", units, vectors.get("b1"), 0.0)
        if norm is not None:
            _lengthen(norm, "weight", units, vectors.get("norm_scale"), 1.0)
            _lengthen(norm, "bias", units, vectors.get("norm_shift"), 0.0)
            norm.num_groups += norm.num_groups * units // norm.num_channels
            norm.num_channels += units
    for layer, name in ((hidden, "out"), (reader, "in")):
        size = f"{name}_features" if isinstance(layer, nn.Linear) else f"{name}_channels"
        setattr(layer, size, getattr(layer, size) + units)


def _lengthen(module: nn.Module, name: str, units: int, more: Tensor | None, otherwise: float) -> None:
    present = getattr(module, name)
    if present is not None:
        added = present.new_full((units,), otherwise) if more is None else more.to(present)
        setattr(module, name, nn.Parameter(torch.cat([present, added])))
