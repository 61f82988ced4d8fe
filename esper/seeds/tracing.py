"""A trace of one forward of a host: the origin of its tensors, the axis of their features, and the weights that are read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from esper.seeds.compiled_modules import uncompiled
from esper.seeds.feature_axis import TracedInput, axis_after, axis_of_kind, is_linear

_LIKE = frozenset(("to", "type_as", "view_as", "reshape_as", "expand_as"))
"""Functions that read their first tensor; any other tensor only gives the dtype or shape of the result."""


@dataclass(eq=False)
class TracedTensor:
    """A tensor that a function gave; ``axis`` is that of its features, ``age`` grows with every node."""

    kind: str
    age: int
    inputs: list[TracedTensor] = field(default_factory=list)
    axis: int | None = None
    linear: str | None = None  # name of the linear module whose output it is


@dataclass
class ModuleCall:
    """A call of a module: the tensors that went in and came out, and whether they are of the same shape."""

    name: str
    module: nn.Module
    source: TracedTensor | None
    output: TracedTensor
    same_shape: bool


class ForwardTrace(TorchFunctionMode):
    """Follows the tensors of one forward through functions and modules.

    ``called`` holds the modules that were called, and ``calls`` their calls in the order in which they ended. ``read_elsewhere`` holds the
    ids of parameters that a function read outside the forward of their own module.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.called: set[nn.Module] = set()
        self.calls: list[ModuleCall] = []
        self.read_elsewhere: set[int] = set()
        self._holders: dict[int, list[nn.Module]] = {}
        for module in model.modules():
            for parameter in module._parameters.values():
                if parameter is not None:
                    self._holders.setdefault(id(parameter), []).append(module)
        self._inside: list[nn.Module] = []
        self._nodes: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._ages = count()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        tensors = list(tensors_in((args, named)))
        nodes = [self.node(tensor) for tensor in tensors]
        given = [_given(tensor, node) for tensor, node in zip(tensors, nodes, strict=True)]  # before a function changes it in place
        output = func(*args, **named)
        made = list(tensors_in(output))
        if made:
            kind = _kind(func)
            self._note_reading(kind, tensors)
            call = partial(_called_with, func, args, named)
            for tensor in made:
                self._nodes[tensor] = TracedTensor(kind, next(self._ages), nodes, axis_after(kind, call, given, tensor.shape))
        return output

    def node(self, tensor: Tensor) -> TracedTensor:
        """Where a tensor came from; one that no function gave is a node without inputs."""
        if tensor not in self._nodes:
            self._nodes[tensor] = TracedTensor("input", next(self._ages))
        node: TracedTensor = self._nodes[tensor]
        return node

    def hook(self, name: str) -> Callable[..., None]:
        """A forward hook that notes a call of the module ``name``."""

        def note(module: nn.Module, inputs: Any, named: Any, output: Any) -> None:
            given, result = next(tensors_in((inputs, named)), None), next(tensors_in(output), None)
            if result is None:
                return
            node, source = self.node(result), None if given is None else self.node(given)
            same = given is not None and given.shape == result.shape
            if is_linear(module):
                node.linear = name
            if node.axis is None and not any(True for _ in module.children()):  # a function that cannot be looked into
                node.axis = axis_of_kind(module, result.dim())
            if node.axis is None and same and source is not None:
                node.axis = source.axis
            self.calls.append(ModuleCall(name, module, source, node, same))

        return note

    def enter(self, module: nn.Module, inputs: Any) -> None:
        """A forward pre-hook: this module reads whatever is read from here on."""
        self._inside.append(module)
        self.called.add(module)

    def leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        """A forward hook, the end of ``enter``."""
        self._inside.pop()

    def _note_reading(self, kind: str, tensors: list[Tensor]) -> None:
        if kind.endswith("_like") or kind.startswith("new_"):
            return
        for tensor in tensors[:1] if kind in _LIKE else tensors:
            holders = self._holders.get(id(tensor))
            if holders is not None and not any(self._inside and self._inside[-1] is holder for holder in holders):
                self.read_elsewhere.add(id(tensor))


@contextmanager
def tracing(model: nn.Module, named: dict[str, nn.Module]) -> Iterator[ForwardTrace]:
    """Within, the model runs once and the watch that was yielded notes the calls of the ``named`` modules; nothing is compiled."""
    trace = ForwardTrace(model)
    handles = [module.register_forward_pre_hook(trace.enter) for module in model.modules()]
    handles += [module.register_forward_hook(trace.hook(name), with_kwargs=True) for name, module in named.items()]
    handles += [module.register_forward_hook(trace.leave, always_call=True) for module in model.modules()]
    try:
        with uncompiled(), trace:
            yield trace
    finally:
        for handle in handles:
            handle.remove()


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in a nest of tuples, lists and dicts, in their order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from tensors_in(part)
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from tensors_in(part)


def _given(tensor: Tensor, node: TracedTensor) -> TracedInput:
    axis = None if node.axis is None or node.axis >= tensor.dim() else node.axis  # set_data may have given it another shape
    return TracedInput(tensor.shape, axis, node.age, isinstance(tensor, nn.Parameter))


def _kind(func: Any) -> str:
    name = getattr(func, "__name__", "")
    if name == "__get__":  # an attribute of a tensor
        return str(getattr(getattr(func, "__self__", None), "__name__", ""))
    name = name.partition(".")[0].strip("_")
    return {"iadd": "add", "radd": "add", "imul": "mul", "rmul": "mul", "truediv": "div", "rtruediv": "div"}.get(name, name)


def _called_with(func: Any, args: Any, named: dict[str, Any], other: Tensor) -> Any:
    """The result of ``func`` with ``other`` in the place of its tensors."""
    replaced = {key: other if isinstance(value, Tensor) else value for key, value in named.items()}
    return func(*(other if isinstance(value, Tensor) else value for value in args), **replaced)
