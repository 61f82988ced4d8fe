"""A trial, before anything grows, whether a host's blocks can be called a second time on their own output."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from esper.blueprints.block import bare
from esper.blueprints.block_call import BlockCall, first_tensor
from esper.blueprints.heads import add_heads
from esper.errors import UserError
from esper.seeds.sites import Forward, Site, quiet_evaluation


def refuse_uncallable_blocks(model: nn.Module, sites: list[Site], forward: Forward) -> None:
    """Run the model once; a copy of one block of each kind is called as the host called the block, on the block's output.

    Raises:
        UserError: the copy fails, or gives another shape, so that no block could grow there.
    """
    tried: set[type[nn.Module]] = set()
    handles = []
    for site in sites:
        if site.geometry.residual and type(site.module) not in tried:
            tried.add(type(site.module))
            handles.append(site.module.register_forward_hook(_trial(site.name), with_kwargs=True))
    try:
        with quiet_evaluation(model):
            forward()
    finally:
        for handle in handles:
            handle.remove()


def refuse_rigid(model: nn.Module, sites: list[Site], forward: Forward) -> None:
    """Run the model once; a copy of each site's attention layer with one silent head more has to answer what the layer answered.

    Raises:
        UserError: it does not, so that no heads can be added there.
    """
    handles = [site.module.register_forward_hook(_wider_trial(site.name), with_kwargs=True) for site in sites]
    try:
        with quiet_evaluation(model):
            forward()
    finally:
        for handle in handles:
            handle.remove()


def _wider_trial(name: str) -> Callable[[nn.Module, Any, Any, Any], None]:
    def hook(module: nn.Module, inputs: Any, named: Any, output: Any) -> None:
        twin, kind = bare(module), type(module).__name__
        try:
            add_heads(twin, 1)
            answer = twin(*inputs, **named)
            why = "" if torch.allclose(answer, output, rtol=1e-3, atol=1e-5) else "gives other values"
        except Exception as error:  # whatever a host's own code raises
            why = f"fails: {' '.join(str(error).split()).rstrip('.')}"
        if why:
            raise UserError(f"blueprint 'heads': heads cannot be added at '{name}': with one head more, a {kind} {why}.")

    return hook


def _trial(name: str) -> Callable[[nn.Module, Any, Any, Any], None]:
    def hook(module: nn.Module, inputs: Any, named: Any, output: Any) -> None:
        hooks, kind = dict(module._forward_hooks), type(module).__name__
        module._forward_hooks.clear()
        try:
            twin = copy.deepcopy(module)
        finally:
            module._forward_hooks.update(hooks)
        x = first_tensor(output)
        if x is None:
            raise UserError(f"blueprint 'block' cannot grow at '{name}': {kind} gives no tensor.")
        try:
            y = BlockCall.of(inputs, named).answer(twin, x)
        except Exception as error:  # whatever a host's own code raises
            why = " ".join(str(error).split()).rstrip(".")
            raise UserError(f"blueprint 'block' cannot grow at '{name}': a second {kind} behind it fails: {why}.") from error
        if y.shape != x.shape:
            shapes = f"{list(x.shape)} into {list(y.shape)}"
            raise UserError(f"blueprint 'block' cannot grow at '{name}': a second {kind} behind it turns {shapes}.")

    return hook
