"""Sites by role, derived from the host's computation: one forward is traced, and the modules' tensors are followed.

``mlp_hidden``  a linear layer whose output reaches another linear layer through a nonlinearity and nothing but elementwise
                operations: the hidden layer of a perceptron, gated ones included, before its activation;
``residual``    the output of a block that adds something to its input (post-norm blocks too);
``conv_out``    a convolution's output (1-D or 2-D).
"""

from __future__ import annotations

from typing import Any

from torch import nn

from esper.seeds.feature_axis import is_linear
from esper.seeds.tracing import ModuleCall, TracedTensor

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
        "T",
        "mT",
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


def with_role(role: str, calls: list[ModuleCall], order: dict[str, Any]) -> list[str]:
    """Names of the modules that have a role in the forward whose calls are given, as ``order`` has them."""
    rules = {"mlp_hidden": _hidden, "residual": _blocks, "conv_out": _convolutions}
    found = rules[role](calls)
    return [name for name in order if name in found]


def _hidden(calls: list[ModuleCall]) -> set[str]:
    names: set[str] = set()
    for call in calls:
        if is_linear(call.module) and call.source is not None:
            names |= {name for name, bent in _origins(call.source) if bent}
    return names


def _origins(start: TracedTensor) -> set[tuple[str, bool]]:
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


def _roots(node: TracedTensor) -> list[TracedTensor]:
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


def _blocks(calls: list[ModuleCall]) -> set[str]:
    skips = {
        call.name: call.module
        for call in calls
        if call.same_shape and call.source is not None and any(True for _ in call.module.children()) and _skips(call)
    }
    stacks = {name for name in skips if any(_in_a_list(name, other, skips[name]) for other in skips)}
    blocks = {name for name in skips if name not in stacks}
    return {name for name in blocks if not any(name.startswith(f"{other}.") for other in blocks)}


def _in_a_list(stack: str, name: str, module: nn.Module) -> bool:
    """Whether the block ``name`` is in a list of blocks inside ``stack``."""
    if not name.startswith(f"{stack}."):
        return False
    parent = name.removeprefix(f"{stack}.").rpartition(".")[0]
    return isinstance(module.get_submodule(parent), (nn.ModuleList, nn.Sequential))


def _skips(call: ModuleCall) -> bool:
    """Whether a path of sums (and functions that keep them) leads from the block's output back to its input."""
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


def _convolutions(calls: list[ModuleCall]) -> set[str]:
    return {call.name for call in calls if isinstance(call.module, (nn.Conv1d, nn.Conv2d))}
