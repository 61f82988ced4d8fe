"""Sites by role, worked out from what the host computes: one forward is watched, and the modules' tensors are followed.

``mlp_hidden``  a linear layer whose output reaches another linear layer through a nonlinearity and nothing but elementwise
                operations: the hidden layer of a perceptron, gated ones included, before its activation;
``residual``    a block that gives its input plus something (post-norm blocks too): where the residual stream leaves it;
``conv_out``    a convolution's output (1-D or 2-D).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

ROLES = ("mlp_hidden", "residual", "conv_out")

_NONLINEAR = frozenset(
    [
        "relu",
        "gelu",
        "silu",
        "mish",
        "tanh",
        "sigmoid",
        "elu",
        "selu",
        "celu",
        "leaky_relu",
        "prelu",
        "relu6",
        "hardswish",
        "hardtanh",
        "hardsigmoid",
        "softplus",
        "erf",
        "pow",
        "square",
        "mul",
        "multiply",
        "div",
        "true_divide",
        "sub",
        "rsub",
        "neg",
        "clamp",
        "where",
    ]
)
_UNCHANGED = frozenset(
    [
        "dropout",
        "feature_dropout",
        "dropout1d",
        "dropout2d",
        "alpha_dropout",
        "view",
        "reshape",
        "permute",
        "transpose",
        "contiguous",
        "to",
        "float",
        "half",
        "bfloat16",
        "type",
        "type_as",
        "flatten",
        "unsqueeze",
        "squeeze",
        "clone",
        "getitem",
        "chunk",
        "split",
        "detach",
        "movedim",
        "identity",
        "native_dropout",
        "_to_copy",
    ]
)
_RECTIFIERS = frozenset(("relu", "relu6", "gelu", "silu", "hardswish", "leaky_relu"))
_NORMS = frozenset(("layer_norm", "rms_norm", "group_norm", "batch_norm"))


@dataclass(eq=False)
class _Node:
    """A tensor that a function gave."""

    kind: str
    inputs: list[_Node] = field(default_factory=list)
    linear: str | None = None  # name of the linear module whose output it is


@dataclass
class _Call:
    name: str
    module: nn.Module
    source: _Node | None
    output: _Node
    same_shape: bool


class _Watch(TorchFunctionMode):
    """Follows tensors through functions and modules; keeps them alive, so that an id means one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[_Call] = []
        self._nodes: dict[int, _Node] = {}
        self._alive: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = [self.node(tensor) for tensor in _tensors((args, kwargs or {}))]
        output = func(*args, **(kwargs or {}))
        kind = _kind(func)
        for tensor in _tensors(output):
            self._nodes[id(tensor)] = _Node(kind, inputs)
            self._alive.append(tensor)
        return output

    def node(self, tensor: Tensor) -> _Node:
        """Where a tensor came from; one that no function gave is a node without inputs."""
        if id(tensor) not in self._nodes:
            self._nodes[id(tensor)] = _Node("input")
            self._alive.append(tensor)
        return self._nodes[id(tensor)]

    def hook(self, name: str) -> Callable[..., None]:
        """A forward hook that notes a call of the module ``name``."""

        def note(module: nn.Module, inputs: Any, named: Any, output: Any) -> None:
            given, result = next(_tensors((inputs, named)), None), next(_tensors(output), None)
            if result is None:
                return
            node = self.node(result)
            if is_linear(module):
                node.linear = name
            same = given is not None and given.shape == result.shape
            self.calls.append(_Call(name, module, None if given is None else self.node(given), node, same))

        return note


@contextmanager
def watching(model: nn.Module, roles: list[str]) -> Iterator[dict[str, list[str]]]:
    """Within, the model runs once; afterwards the dict that was yielded has each role's modules, in the host's order."""
    found: dict[str, list[str]] = {}
    if not roles:
        yield found
        return
    watch = _Watch()
    named = [(name, module) for name, module in model.named_modules() if name]
    handles = [module.register_forward_hook(watch.hook(name), with_kwargs=True) for name, module in named]
    try:
        with watch:
            yield found
    finally:
        for handle in handles:
            handle.remove()
    rules = {"mlp_hidden": _hidden, "residual": _blocks, "conv_out": _convolutions}
    order = {name: number for number, (name, _) in enumerate(named)}
    found.update({role: sorted(rules[role](watch.calls), key=order.__getitem__) for role in roles})


def is_linear(module: nn.Module) -> bool:
    """A linear layer of torch, or the ``Conv1D`` that transformers' GPT-2 has for one."""
    return isinstance(module, nn.Linear) or (type(module).__name__ == "Conv1D" and hasattr(module, "nf"))


def _hidden(calls: list[_Call]) -> set[str]:
    names: set[str] = set()
    for call in calls:
        if is_linear(call.module) and call.source is not None:
            names |= {name for name, bent in _origins(call.source) if bent}
    return names


def _origins(start: _Node) -> set[tuple[str, bool]]:
    """(linear layer, whether a nonlinearity lies between) of everything elementwise before ``start``; empty where streams meet."""
    found: set[tuple[str, bool]] = set()
    seen: set[tuple[int, bool]] = set()
    open_nodes = [(start, False)]
    while open_nodes:
        node, bent = open_nodes.pop()
        if (id(node), bent) in seen:
            continue
        seen.add((id(node), bent))
        if node.linear is not None:
            found.add((node.linear, bent))
        elif node.kind == "add" and len(node.inputs) > 1 and len({id(root) for part in node.inputs for root in _roots(part)}) > 1:
            continue  # a residual stream: what enters the sum is no hidden layer
        elif node.kind in _NONLINEAR or node.kind in _UNCHANGED or node.kind == "add":
            open_nodes += [(part, bent or node.kind in _NONLINEAR) for part in node.inputs]
    return found


def _roots(node: _Node) -> list[_Node]:
    """Where elementwise operations on one tensor began."""
    seen: set[int] = set()
    roots, open_nodes = [], [node]
    while open_nodes:
        current = open_nodes.pop()
        if id(current) in seen:
            continue
        seen.add(id(current))
        elementwise = current.kind in _NONLINEAR or current.kind in _UNCHANGED or current.kind == "add"
        if current.linear is None and elementwise and current.inputs:
            open_nodes += current.inputs
        else:
            roots.append(current)
    return roots


def _blocks(calls: list[_Call]) -> set[str]:
    skips = {
        call.name: call.module
        for call in calls
        if call.same_shape and call.source is not None and any(True for _ in call.module.children()) and _skips(call)
    }
    stacks = {name for name in skips if any(_in_a_list(name, other, skips[name]) for other in skips)}
    blocks = {name for name in skips if name not in stacks}
    return {name for name in blocks if not any(name.startswith(f"{other}.") for other in blocks)}


def _in_a_list(stack: str, name: str, module: nn.Module) -> bool:
    """Whether the block ``name`` lies in a list of blocks inside ``stack``."""
    if not name.startswith(f"{stack}."):
        return False
    parent = name.removeprefix(f"{stack}.").rpartition(".")[0]
    return isinstance(module.get_submodule(parent), (nn.ModuleList, nn.Sequential))


def _skips(call: _Call) -> bool:
    """Whether a path of sums (and what may stand beside them) leads from the block's output back to its input."""
    seen: set[tuple[int, bool]] = set()
    open_nodes = [(call.output, False)]
    while open_nodes:
        node, summed = open_nodes.pop()
        if node is call.source and summed:
            return True
        if node is call.source or (id(node), summed) in seen:
            continue
        seen.add((id(node), summed))
        sums = node.kind == "add" and len(node.inputs) > 1
        if sums:
            open_nodes += [(part, True) for part in node.inputs]
        elif node.kind in _UNCHANGED or node.kind in _RECTIFIERS or node.kind in _NORMS or node.kind == "add":
            open_nodes += [(part, summed) for part in node.inputs[:1]]
    return False


def _convolutions(calls: list[_Call]) -> set[str]:
    return {call.name for call in calls if isinstance(call.module, (nn.Conv1d, nn.Conv2d))}


def _kind(func: Any) -> str:
    name = getattr(func, "__name__", "").strip("_")
    return {"iadd": "add", "radd": "add", "imul": "mul", "rmul": "mul", "truediv": "div", "rtruediv": "div"}.get(name, name)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _tensors(part)
