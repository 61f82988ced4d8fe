"""Which models can carry seeds: the others are refused, in words, and wrappers of torch.compile are taken off."""

from __future__ import annotations

import itertools
import sys
from typing import Any

import torch
from torch import Tensor, nn

from esper.distributed.sharding import is_shard, is_sharded
from esper.errors import UserError
from esper.seeds.layer import ATTRIBUTE

#: Packages whose layers hold weights that are no floating-point numbers.
_QUANTIZED = (
    "torch.ao.nn.quantized",
    "torch.ao.nn.intrinsic.quantized",
    "torch.nn.quantized",
    "bitsandbytes",
    "auto_gptq",
    "awq",
    "gptqmodel",
    "hqq",
)


def fit(model: nn.Module) -> nn.Module:
    """The model to attach seeds to: ``model`` itself, or the one that ``torch.compile`` or DistributedDataParallel wraps.

    Raises:
        UserError: a model that cannot carry seeds, with the remedy.
    """
    if isinstance(model, nn.DataParallel):
        raise UserError("nn.DataParallel copies the model at every step, so seeds cannot live on it; train it on one device.")
    model = _unwrapped(model)
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()  # earlier graphs, also of a step around the model, know nothing of the new hooks
    if any(hasattr(module, ATTRIBUTE) for module in model.modules()):
        raise UserError("This model carries seeds already; call export() on the first handle, or attach once.")
    if next(itertools.chain(model.parameters(), model.buffers()), None) is None:
        raise UserError("This model has no parameters, so there is nothing to grow beside.")
    sharded = is_sharded(model)
    for name, module in model.named_modules():
        _refuse_first_fsdp(name, module)
        if isinstance(module, nn.DataParallel):
            raise UserError(f"'{name}' is nn.DataParallel, which copies it at every step; train it on one device.")
        reason = _unplain(module, sharded)
        if reason is not None:
            which = f"The layer '{name}'" if name else "This model"
            raise UserError(
                f"{which} ({type(module).__name__}) {reason}; seeds need layers in floating point: attach to the model before it is "
                "quantized or sharded, export, and quantize the exported model."
            )
        _refuse_switched_on(name, module)
    if not any(p.is_floating_point() for p in model.parameters()):
        raise UserError("This model has no parameters in floating point, so there is nothing to grow beside.")
    return model


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model in the wrappers of torch.compile and DistributedDataParallel, which run the same modules.

    Seeds live in it, and DistributedDataParallel never sees a branch: esper averages their gradients itself.
    """
    while True:
        inner = getattr(model, "_orig_mod", model)
        if isinstance(inner, nn.parallel.DistributedDataParallel):
            inner = inner.module
        if inner is model:
            return model
        model = inner


def _refuse_first_fsdp(name: str, module: nn.Module) -> None:
    """The first FSDP keeps the weights of many layers in one flat tensor, of which no layer can be told."""
    if any(kind.__name__ == "FullyShardedDataParallel" for kind in type(module).__mro__):
        where = f"'{name}'" if name else "The model"
        raise UserError(f"{where} is in FullyShardedDataParallel, which hides its layers; use torch.distributed.fsdp.fully_shard instead.")


def _unplain(module: nn.Module, sharded: bool = False) -> str | None:
    """Why the module's weights are not numbers in floating point as torch keeps them, or None; ``sharded`` by ``fully_shard`` is fine."""
    by_transformers = getattr(module, "is_quantized", False) is True or getattr(module, "hf_quantizer", None) is not None
    if by_transformers or type(module).__module__.startswith(_QUANTIZED):
        return "is quantized"
    for name, parameter in module._parameters.items():
        if parameter is None:
            continue
        kind = type(parameter)
        if name == "weight" and not parameter.is_floating_point():
            return "is quantized"
        if sharded and is_shard(parameter) and sum(place.is_shard() for place in _placements(parameter)) <= 1:
            continue
        if kind is not Tensor and kind.__module__ != nn.Parameter.__module__:
            return f"keeps its {name} in a {kind.__name__}, a kind of tensor that may be quantized or sharded"
    return None


def _placements(parameter: Any) -> tuple[Any, ...]:
    found: tuple[Any, ...] = tuple(parameter.placements)
    return found


def refuse_reentrant(loss: Tensor) -> list[Tensor]:
    """Look in the graph of a loss for the node of ``torch.utils.checkpoint`` with ``use_reentrant=True``.

    Returns the leaves of the graph: the weights that the forward has used.

    Raises:
        UserError: it is there. Its backward cannot give gradients to chosen tensors, nor to any that is made inside.
    """
    open_nodes, seen, leaves = [loss.grad_fn], set(), []
    while open_nodes:
        node = open_nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name() == "CheckpointFunctionBackward":
            raise UserError(
                "This model uses reentrant gradient checkpointing, under which no branch could learn; call torch.utils.checkpoint "
                "with use_reentrant=False."
            )
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            leaves.append(leaf)
        open_nodes += [following for following, _ in node.next_functions]
    return leaves


def _refuse_switched_on(name: str, module: nn.Module) -> None:
    """transformers keeps the checkpointing function on its modules; the reentrant one cannot give gradients to chosen tensors."""
    function = getattr(module, "_gradient_checkpointing_func", None)
    if getattr(module, "gradient_checkpointing", False) and getattr(function, "keywords", {}).get("use_reentrant"):
        raise UserError(
            f"'{name or type(module).__name__}' uses reentrant gradient checkpointing, under which no branch could learn; enable it with "
            "gradient_checkpointing_kwargs={'use_reentrant': False}."
        )
