"""Hidden layers of a host that can be widened: found by what they compute, listened to, and widened in an exported model."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from esper.blueprints.width import ACTIVATIONS

BETWEEN = 4
"""Linear layers called last among which a layer's hidden layer is looked for."""


@dataclass(frozen=True)
class HiddenLayer:
    """A linear layer of the host whose activation one other linear layer reads."""

    name: str
    module: nn.Linear
    activation: str


def hidden_layers(modules: dict[str, nn.Module], forward: Callable[[], Any]) -> dict[str, HiddenLayer]:
    """By the name of the layer that reads it, every hidden layer: what goes into that layer *is* an activation of its output.

    The model runs in evaluation mode, so dropout between them does nothing. Layers that share a weight with another module, run more than
    once, or whose output serves elsewhere too, are left out.
    """
    layers = {name: module for name, module in modules.items() if type(module) is nn.Linear}
    holders = [id(parameter) for module in modules.values() for parameter in module._parameters.values() if parameter is not None]
    calls: dict[str, int] = dict.fromkeys(layers, 0)
    recent: deque[tuple[str, Tensor]] = deque(maxlen=BETWEEN)
    found: dict[str, HiddenLayer] = {}

    def note(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            calls[name] += 1
            for other, values in recent:
                activation = _activation_of(values, inputs[0])
                if activation is not None:
                    found[name] = HiddenLayer(other, layers[other], activation)
            recent.append((name, output.detach().clone()))  # the host may go on in place

        return hook

    handles = [module.register_forward_hook(note(name)) for name, module in layers.items()]
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    once = {name for name, count in calls.items() if count == 1 and holders.count(id(layers[name].weight)) == 1}
    candidates = {name: hidden for name, hidden in found.items() if name in once and hidden.name in once}
    pairs = {name: (hidden.module, layers[name]) for name, hidden in candidates.items()}
    if not pairs or _bear_one_more(list(pairs.values()), forward):
        return candidates
    return {name: hidden for name, hidden in candidates.items() if _bear_one_more([pairs[name]], forward)}


def _bear_one_more(pairs: list[tuple[nn.Linear, nn.Linear]], forward: Callable[[], Any]) -> bool:
    """Whether the host gives what it gave with one more unit in these hidden layers, which nothing is read from."""
    before = forward()
    layers = list(dict.fromkeys(layer for pair in pairs for layer in pair))
    kept = [(layer, layer.weight, layer.bias, layer.in_features, layer.out_features) for layer in layers]
    try:
        for hidden, reader in pairs:
            unit = {"w1": hidden.weight[:1].t().detach(), "w2": hidden.weight.new_zeros(1, reader.out_features)}
            widen(hidden, reader, 1, unit)
        after = forward()
    except Exception:  # whatever a host's own code says to another width
        return False
    finally:
        for layer, weight, bias, inputs, outputs in kept:
            layer.weight, layer.bias, layer.in_features, layer.out_features = weight, bias, inputs, outputs
    alike = before.shape == after.shape if isinstance(before, Tensor) and isinstance(after, Tensor) else before is None
    return alike and (before is None or torch.allclose(before, after, rtol=1e-3, atol=1e-5))


def _activation_of(values: Tensor, given: Tensor) -> str | None:
    """Which activation of ``values`` is ``given``, None where none is."""
    if values.shape != given.shape or not bool((values < 0).any()):  # of positive numbers a ReLU cannot be told from nothing
        return None
    return next((name for name, function in ACTIVATIONS.items() if torch.allclose(function(values), given, rtol=1e-4, atol=1e-6)), None)


class Source:
    """Hears what a hidden layer reads in a forward, until the site behind it has used it."""

    def __init__(self, module: nn.Module | None = None) -> None:
        self.activation: Tensor | None = None
        self._handle = None if module is None else module.register_forward_pre_hook(self.hear)

    def hear(self, module: nn.Module, inputs: Any) -> None:
        """A forward pre-hook."""
        self.activation = inputs[0]

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


def widen(hidden: nn.Linear, reader: nn.Linear, units: int, values: dict[str, Tensor] | None = None, alpha: float = 1.0) -> None:
    """Give ``hidden`` ``units`` more outputs and ``reader`` as many inputs, in place, with the ``values`` of a branch (None: zeros).

    Where either has been widened from its other side already, the new units know nothing of the units that came so.
    """
    values = values or {}
    with torch.no_grad():
        rows = hidden.weight.new_zeros(units, hidden.in_features)
        columns = reader.weight.new_zeros(reader.out_features, units)
        if values:
            rows[:, : values["w1"].shape[0]] = values["w1"].t()
            columns[: values["w2"].shape[1]] = alpha * values["w2"].t()
        hidden.weight = nn.Parameter(torch.cat([hidden.weight, rows]))
        reader.weight = nn.Parameter(torch.cat([reader.weight, columns], 1))
        if hidden.bias is not None:
            more = values["b1"].to(hidden.bias) if "b1" in values else hidden.bias.new_zeros(units)
            hidden.bias = nn.Parameter(torch.cat([hidden.bias, more]))
    hidden.out_features += units
    reader.in_features += units
