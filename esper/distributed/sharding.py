"""A host whose weights are shared out among the processes by FSDP2 (``torch.distributed.fsdp.fully_shard``).

Every pass through such a host takes all processes: its layers gather their weights when they are called. No process has the whole host,
unless ``whole`` gathers it. Nothing here imports FSDP, so that a host that is not sharded does not pay for it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
)
_FLAGS = ("_is_fsdp_managed_module", "_fsdp_use_orig_params")


def is_shard(tensor: Any) -> bool:
    """Whether a tensor is torch's ``DTensor``, of which a process may hold a part."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor: all of one that is not sharded. It shares the tensor's memory."""
    held: Any = tensor
    part: Tensor = held.to_local() if is_shard(tensor) else tensor
    return part


def sharded_modules(model: nn.Module) -> list[Any]:
    """The modules to which ``fully_shard`` was applied."""
    module = sys.modules.get("torch.distributed.fsdp")
    return [] if module is None else [one for one in model.modules() if isinstance(one, module.FSDPModule)]


def is_sharded(model: nn.Module) -> bool:
    """Whether ``fully_shard`` was applied to any part of the model."""
    return bool(sharded_modules(model))


def mesh_of(model: nn.Module) -> Any:
    """The device mesh over which the model is sharded, None for one that is not."""
    let_go(model)
    shards: list[Any] = [parameter for parameter in model.parameters() if is_shard(parameter)]
    return shards[0].device_mesh if shards else None


def class_name(module: nn.Module) -> str:
    """The name of the module's class as it was before ``fully_shard``, which puts one of its own in its place."""
    return _plain_class(module).__name__


def _plain_class(module: nn.Module) -> type:
    fsdp = sys.modules.get("torch.distributed.fsdp")
    kind = type(module)
    if fsdp is None or not issubclass(kind, fsdp.FSDPModule):
        return kind
    found: type = kind.__mro__[getattr(kind, "_orig_cls_mro_index", 2)]
    return found


def let_go(model: nn.Module) -> None:
    """Let every layer give back the weights that it has gathered.

    FSDP does so after a backward pass; after a forward pass alone, the outermost layers keep theirs, and would not see a change of the
    weights until then. Call after passes beside the loop's own, and wherever weights are written.
    """
    for module in sharded_modules(model):
        module.reshard()


@torch.no_grad()
def put(target: Tensor, value: Tensor) -> None:
    """``target.copy_(value)``, where either may be sharded: a whole value gives each process its part."""
    if is_shard(target) and not is_shard(value):
        held: Any = target
        local(target).copy_(_part_of(value, held.device_mesh, held.placements))
    else:
        whole_or_same: Any = value
        target.copy_(whole_or_same.full_tensor() if is_shard(value) and not is_shard(target) else value)


def like(target: Tensor, value: Tensor) -> Tensor:
    """A copy of ``value`` where the parameter ``target`` lies, sharded as it is."""
    if not is_shard(target) or is_shard(value) or value.shape != target.shape:
        return value.to(local(target).device, copy=True)
    made = torch.empty_like(target, dtype=value.dtype)
    put(made, value)
    return made


def _part_of(value: Tensor, mesh: Any, placements: Any) -> Tensor:
    """What this process holds of a whole tensor; nothing is sent."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(value.shape, mesh, placements)
    part = value
    for dim, (size, start) in enumerate(zip(shape, offset, strict=True)):
        part = part.narrow(dim, min(start, value.shape[dim] - size), size)
    return part


@contextmanager
def whole(model: nn.Module, device: torch.device | None = None) -> Iterator[None]:
    """Context in which the model is an ordinary one, with all weights whole, on ``device`` (None: the CPU). All processes enter it.

    Nothing may be trained within.
    """
    undo = make_whole(model, device)
    try:
        yield
    finally:
        undo()


@torch.no_grad()
def make_whole(model: nn.Module, device: torch.device | None = None) -> Callable[[], None]:
    """Make the model an ordinary one, with all weights whole; returns what undoes it. All processes call this together."""
    if not is_sharded(model):
        return lambda: None
    let_go(model)
    device = device or torch.device("cpu")
    modules = list(model.modules())
    before = [(one, type(one), dict(one.__dict__), (dict(one._parameters), dict(one._buffers)), _hooks_of(one)) for one in modules]
    gathered: dict[int, nn.Parameter] = {}
    for module in modules:
        for name, parameter in module._parameters.items():
            if is_shard(parameter):
                if id(parameter) not in gathered:
                    held: Any = parameter
                    values = held.full_tensor().to(device)
                    gathered[id(parameter)] = nn.Parameter(values, requires_grad=held.requires_grad)
                module._parameters[name] = gathered[id(parameter)]
        module._buffers.update({name: buffer.to(device) for name, buffer in module._buffers.items() if buffer is not None})
    for module in modules:
        _forget_fsdp(module)

    def undo() -> None:
        for module, kind, attributes, (parameters, buffers), hooks in before:
            module.__class__ = kind
            module.__dict__.update(attributes)
            module._parameters.update(parameters)
            module._buffers.update(buffers)
            for name, saved in hooks.items():
                getattr(module, name).clear()
                getattr(module, name).update(saved)

    return undo


def _hooks_of(module: nn.Module) -> dict[str, dict[int, Any]]:
    return {name: dict(getattr(module, name)) for name in _HOOKS}


def _forget_fsdp(module: nn.Module) -> None:
    """Take off a module everything that ``fully_shard`` has put on it."""
    from torch.distributed._composable.contract import REGISTRY_KEY, STATE_KEY

    module.__class__ = _plain_class(module)
    for name in (*_FLAGS, STATE_KEY, REGISTRY_KEY):
        module.__dict__.pop(name, None)
    keys = [key for name in _HOOKS for key, hook in getattr(module, name).items() if _is_of_fsdp(hook)]
    for name in _HOOKS:
        for key in keys:
            getattr(module, name).pop(key, None)


def _is_of_fsdp(hook: Any) -> bool:
    inner = getattr(hook, "hook", hook)  # as torch wraps those of load_state_dict
    return str(getattr(inner, "__module__", "")).startswith("torch.distributed.fsdp")
