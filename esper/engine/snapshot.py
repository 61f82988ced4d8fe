"""The last good state in memory: host, its optimizer's state, and every living branch; a rollback puts it back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from esper.blueprints import SlotBank
from esper.distributed.sharding import let_go, like, local, put
from esper.engine.extra_passes import host_buffers, host_parameters
from esper.seeds import SeedRegistry

OptimizerState = list[dict[str, Any]]
"""One dict a host parameter, in the order of the optimizer's groups: tensors and numbers by name."""


class Snapshot:
    """A copy of host and branches taken at ``tick``. Restoring rewinds neither the tick count nor any stage or learning rate.

    ``healthy`` says that every number in host, norm statistics and optimizer is finite. The copies never change: a checkpoint may
    save them while training goes on.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer | None, registry: SeedRegistry, tick: int) -> None:
        self.tick = tick
        let_go(model)
        with torch.no_grad():
            self._host = {name: value.detach().clone() for name, value in host_parameters(model).items()}
            self._buffers = {name: value.clone() for name, value in host_buffers(model).items()}
        self._optimizer = None if optimizer is None else _cloned(optimizer_state(optimizer))
        self._branches = {branch.id: branch_state(registry, branch.id) for branch in registry.branches.living()}
        running = [value for name, value in self._buffers.items() if name.rsplit(".", 1)[-1].startswith("running_")]
        self.healthy = finite([*self._host.values(), *running, *_tensors(self._optimizer or [])])

    @torch.no_grad()
    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer | None, registry: SeedRegistry) -> None:
        """Put host, optimizer state, and the branches alive both then and now back as they were."""
        let_go(model)
        for name, value in host_parameters(model).items():
            put(value, self._host[name])
        for name, buffer in host_buffers(model).items():
            buffer.copy_(self._buffers[name])
        if optimizer is not None and self._optimizer is not None:
            restore_optimizer(optimizer, self._optimizer)
        for branch in registry.branches.living():
            if branch.id in self._branches:
                restore_branch(registry, branch.id, self._branches[branch.id])

    def state(self) -> dict[str, Any]:
        """Everything, by reference, for a checkpoint."""
        return {
            "tick": self.tick,
            "healthy": self.healthy,
            "host": self._host,
            "buffers": self._buffers,
            "optimizer": self._optimizer,
            "branches": {str(branch): saved for branch, saved in self._branches.items()},
        }

    @classmethod
    def from_state(cls, state: dict[str, Any], device: torch.device) -> Snapshot:
        """The snapshot again."""
        made = cls.__new__(cls)
        made.tick, made.healthy = int(state["tick"]), bool(state["healthy"])
        made._host = _moved(state["host"], device)
        made._buffers = _moved(state["buffers"], device)
        made._optimizer = state["optimizer"]
        made._branches = {int(branch): _moved(saved, device) for branch, saved in state["branches"].items()}
        return made


def finite(tensors: list[Tensor]) -> bool:
    """Whether every number in every tensor is finite; asks each device once (an optimizer counts its steps on the CPU).

    Of sharded tensors this process knows its part alone.
    """
    by_device: dict[torch.device, list[Tensor]] = {}
    for tensor in map(present_values, map(local, tensors)):
        if tensor.is_floating_point() and tensor.numel():
            by_device.setdefault(tensor.device, []).append(tensor)
    # A sum of squares would overflow; the largest magnitude is NaN or infinite exactly when something is.
    largest = (torch.stack([v.float() for v in torch._foreach_norm(floats, float("inf"))]) for floats in by_device.values())
    return all(bool(torch.isfinite(values).all()) for values in largest)


def present_values(tensor: Tensor) -> Tensor:
    """The tensor itself; of a sparse one, as ``nn.Embedding(sparse=True)`` gives, the values that are not left out as zeros."""
    return tensor.coalesce().values() if tensor.is_sparse else tensor


def optimizer_state(optimizer: torch.optim.Optimizer) -> OptimizerState:
    """The optimizer's state of each parameter, by reference."""
    return [dict(optimizer.state.get(p, {})) for group in optimizer.param_groups for p in group["params"]]


@torch.no_grad()
def restore_optimizer(optimizer: torch.optim.Optimizer, saved: OptimizerState) -> None:
    """Put copies of a saved state back. Raises ValueError for another number of parameters."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if len(parameters) != len(saved):
        raise ValueError(f"the saved optimizer has {len(saved)} parameters, this one {len(parameters)}")
    counts_there = [bool(group.get("fused") or group.get("capturable")) for group in optimizer.param_groups for _ in group["params"]]
    for parameter, values, there in zip(parameters, saved, counts_there, strict=True):
        present = optimizer.state[parameter]
        for name in present.keys() - values.keys():
            del present[name]
        for name, value in values.items():
            if not isinstance(value, Tensor):
                present[name] = value
            elif isinstance(present.get(name), Tensor) and not present[name].is_sparse:
                put(present[name], value)
            else:  # moments go where the parameter is; step counts only where the optimizer counts there
                present[name] = value.clone() if value.dim() == 0 and not there else like(parameter, value)
        if not present:
            del optimizer.state[parameter]


def _cloned(saved: OptimizerState) -> OptimizerState:
    return [{n: _clone(v) if isinstance(v, Tensor) else v for n, v in values.items()} for values in saved]


def _clone(value: Tensor) -> Tensor:
    """A copy that files can hold: a momentum of sparse gradients is itself sparse, and continues just as well from a dense one."""
    return value.to_dense() if value.is_sparse else value.clone()


def _tensors(saved: OptimizerState) -> list[Tensor]:
    return [value for values in saved for value in values.values() if isinstance(value, Tensor)]


def _moved(tree: Any, device: torch.device) -> Any:
    if isinstance(tree, Tensor):
        return tree.to(device)
    if isinstance(tree, dict):
        return {key: _moved(value, device) for key, value in tree.items()}
    return [_moved(value, device) for value in tree] if isinstance(tree, list) else tree


def branch_state(registry: SeedRegistry, branch: int) -> dict[str, Any]:
    """A copy of a branch's parameters, moments and steps."""
    entry = registry.branches[branch]
    bank = registry.layers[entry.site].bank(entry.blueprint)
    if isinstance(bank, SlotBank):
        slot = entry.slot
        rows = {
            name: [bank.stacks[name].detach()[slot].clone(), first[slot].clone(), second[slot].clone()]
            for name, (first, second) in bank.moments.items()
        }
        return {"rows": rows, "steps": bank.steps[slot].clone()}
    key = str(entry.slot)
    return {
        "block": {name: value.clone() for name, value in bank.plain(entry.slot).state_dict().items()},
        "moments": {name: [first.clone(), second.clone()] for name, (first, second) in bank.moments[key].items()},
        "steps": bank.steps[key],
    }


def restore_branch(registry: SeedRegistry, branch: int, saved: dict[str, Any]) -> None:
    """Give a branch the parameters, moments and steps of ``branch_state``; its blueprint and shapes must be the same."""
    entry = registry.branches[branch]
    bank = registry.layers[entry.site].bank(entry.blueprint)
    if isinstance(bank, SlotBank):
        for name, (value, first, second) in saved["rows"].items():
            bank.stacks[name][entry.slot] = value
            bank.moments[name][0][entry.slot] = first
            bank.moments[name][1][entry.slot] = second
        bank.steps[entry.slot] = saved["steps"]
        return
    key = str(entry.slot)
    bank.blocks[key].load_state_dict(saved["block"])
    bank.moments[key] = {name: (first.clone(), second.clone()) for name, (first, second) in saved["moments"].items()}
    bank.steps[key] = saved["steps"]
