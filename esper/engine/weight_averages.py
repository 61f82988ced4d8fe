"""Averages of a model's weights that grow with the model: torch's ``AveragedModel``, Lightning's callbacks, or a plain copy.

An average is a copy of the model that is moved towards it, tensor by tensor in the order of its modules. The copy gets the same
seed layers, with banks of the same shapes, and the averaging covers the branches as well.

A branch enters the average when its FINE_TUNING begins. Before that, and once it is being removed, the average holds its present values: an
average over all steps would include the zeros that it started with. The values of FOSSILIZED branches no longer change.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from esper.blueprints import BlockBank, SlotBank
from esper.distributed import is_sharded
from esper.engine.extra_passes import host_parameters
from esper.engine.saved_state import HostAlone, expect_host_alone
from esper.errors import UserError
from esper.lifecycle import Stage
from esper.seeds import Branch, SeedLayer, SeedRegistry, Site
from esper.seeds.branch_groups import Injection, build
from esper.seeds.hidden_layers import Source
from esper.seeds.layer import ATTRIBUTE, ModelHook, device_of
from esper.seeds.sites import stack_of

AVERAGED = (Stage.FINE_TUNING, Stage.FOSSILIZED)
"""Stages in which the average keeps values of its own for a branch."""


class Follower:
    """One average of the model of ``registry``. ``sync`` it whenever the registry has changed, before the next averaging.

    ``known`` holds averaged values of branches, from ``state``, where the average continues an earlier one.
    """

    def __init__(self, registry: SeedRegistry, averaged: nn.Module, known: dict[str, Any] | None = None) -> None:
        if is_sharded(registry.model):
            raise UserError("An average of the weights cannot follow a host that FSDP shards; average under DistributedDataParallel.")
        self.registry = registry
        self.model = _counterpart(registry.model, averaged)
        self.device = device_of(self.model)
        self._bare()
        self.layers = [self._layer(site) for site in registry.sites]
        self._banks: list[Any] = [None] * len(registry.sites)
        self._built_for: list[Any] = [[]] * len(registry.sites)
        HostAlone.on(averaged)  # branches are saved with ``state``, and fit no fresh copy
        expect_host_alone(averaged)
        self.sync()
        for number, values in (known or {}).items():
            _put(self._values(registry.branches[int(number)]), values)

    @torch.no_grad()
    def sync(self) -> None:
        """Bring banks, alphas and the values of branches that are not averaged up to date."""
        living = self.registry.branches.living()
        for number in range(len(self.layers)):
            here = [branch for branch in living if branch.site == number]
            key = {name: (_size(bank), _order(bank)) for name, bank in self.registry.banks(number).items()}, [(b.id, b.slot) for b in here]
            if key != self._banks[number]:
                self._rebuild(number, here)
                self._banks[number] = key
            self._update_groups(number)
        for branch in living:
            if branch.stage not in AVERAGED:
                _put(self._values(branch), _values(self.registry.layers[branch.site], branch))

    def state(self) -> dict[str, Any]:
        """The averaged values of the branches that have any, by branch; the host's are saved with the average itself."""
        averaged = self.registry.in_stage(*AVERAGED)
        return {str(branch.id): {name: value.detach() for name, value in self._values(branch).items()} for branch in averaged}

    @contextmanager
    @torch.no_grad()
    def applied(self) -> Iterator[None]:
        """Within, the model has the averaged values; afterwards its own."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        kinds = (nn.Module.named_parameters, nn.Module.named_buffers)
        for mine, other in ((dict(kind(self.model)), dict(kind(self.registry.model))) for kind in kinds):
            for name, value in other.items():
                held = value.detach().clone()
                value.detach().copy_(mine[name])
                mine[name].detach().copy_(held)

    # --- the copy's seed layers ---

    def _bare(self) -> None:
        """Take off the copy all seed layers and hooks that it has from a model with seeds."""
        for module in self.model.modules():
            module._modules.pop(ATTRIBUTE, None)
            for hooks in (module._forward_hooks, module._forward_pre_hooks, module._state_dict_hooks):
                for key in [
                    key for key, hook in hooks.items() if isinstance(getattr(hook, "__self__", hook), (SeedLayer, ModelHook, Source))
                ]:
                    del hooks[key]
                    module._forward_hooks_with_kwargs.pop(key, None)

    def _layer(self, site: Site) -> SeedLayer:
        layer = SeedLayer(site)
        layer.attach(self.model.get_submodule(site.name))
        if site.hidden is not None:
            layer.listen(self.model.get_submodule(site.hidden.name))
        elif self.registry.layers[self.registry.by_name[site.name]].source is not None:
            layer.listen(self.model.get_submodule(site.name))
        return layer.train(site.module.training)

    def _rebuild(self, number: int, here: list[Branch]) -> None:
        """Banks like the registry's, in which branches known before keep their averaged values."""
        layer = self.layers[number]
        known: dict[int, dict[str, Tensor]] = {}
        if self._banks[number] is not None:
            before = set(self._banks[number][1])
            known = {b.id: {n: v.clone() for n, v in self._values(b).items()} for b in here if (b.id, b.slot) in before}
        layer.banks = nn.ModuleDict({name: self._twin(bank, layer) for name, bank in self.registry.banks(number).items()})
        self._built_for[number] = []
        for branch in here:
            if branch.id in known:
                _put(self._values(branch), known[branch.id])

    def _twin(self, bank: SlotBank | BlockBank, layer: SeedLayer) -> SlotBank | BlockBank:
        """A bank with the present values and no history, since nothing learns in it."""
        twin: SlotBank | BlockBank
        if isinstance(bank, SlotBank):
            twin = SlotBank(bank.blueprint, bank.geometry, self.device)
            twin.used, twin.capacity = list(bank.used), bank.capacity
            twin.source = None if bank.source is None else layer.source
            for name, stack in bank.stacks.items():
                twin.stacks[name] = nn.Parameter(stack.detach().to(self.device, copy=True))
            return twin
        twin = BlockBank(bank.blueprint, stack_of(self.model, layer.name), self.device)
        twin.tied = set(bank.tied)
        twin.source = None if bank.source is None else layer.source
        twin.blocks = copy.deepcopy(bank.blocks).to(self.device)
        for parameter in twin.blocks.parameters():
            parameter.grad = None
        return twin

    def _update_groups(self, number: int) -> None:
        registry, layer = self.registry, self.layers[number]
        blended = registry.blended(number)
        if [branch.id for branch in blended] != self._built_for[number] or (blended and not layer.groups):
            banks = {name: layer.bank(name) for name in layer.banks}
            layer.groups = build([registry.member(branch, learning=False) for branch in blended], banks, layer.geometry, self.device)
            self._built_for[number] = [branch.id for branch in blended]
        for group in layer.groups:
            assert not isinstance(group, Injection)
            group.alpha.copy_(registry.branches.alpha[group.branches])

    def _values(self, branch: Branch) -> dict[str, Tensor]:
        return _values(self.layers[branch.site], branch)


def _counterpart(model: nn.Module, averaged: nn.Module) -> nn.Module:
    """The copy of ``model`` in an average of it, or of something that holds it. Raises UserError where there is none."""
    names = host_parameters(model).keys()
    for module in averaged.modules():
        if type(module) is type(model) and host_parameters(module).keys() == names:
            if module is model:
                raise UserError("follow was given the model itself; give an average of it, as AveragedModel(model) makes one.")
            return module
    kind = type(averaged).__name__
    raise UserError(f"follow was given a {kind} in which there is no copy of the {type(model).__name__} that grows; average that one.")


def _values(layer: SeedLayer, branch: Branch) -> dict[str, Tensor]:
    """By name, the branch's tensors, which may be written to."""
    bank = layer.bank(branch.blueprint)
    if isinstance(bank, SlotBank):
        return {name: stack.detach()[branch.slot] for name, stack in bank.stacks.items()}
    block = bank.blocks[str(branch.slot)]
    own = () if str(branch.slot) in bank.tied else block.named_parameters()  # shared ones are averaged with the host
    return {name: value.detach() for name, value in (*own, *block.named_buffers())}


@torch.no_grad()
def _put(into: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    for name, value in values.items():
        into[name].copy_(value)


def _size(bank: SlotBank | BlockBank) -> int:
    return bank.capacity if isinstance(bank, SlotBank) else len(bank.blocks)


def _order(bank: SlotBank | BlockBank) -> list[str]:
    return list(bank.stacks) if isinstance(bank, SlotBank) else [*bank.blocks, *sorted(bank.tied)]
