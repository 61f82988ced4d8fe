"""Extra passes through the host that must leave no trace: same dropout masks, buffers put back, no gradient kept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from esper.randomness import GlobalDraws, global_draws_kept, seed_for, seed_global_draws
from esper.seeds.compiled_modules import uncompiled
from esper.seeds.layer import ATTRIBUTE, ModelHook, OpaqueToCompiler, device_of


class DropoutReplay(ModelHook, OpaqueToCompiler):
    """Remembers the global generators as they were before the host's last forward, so that another forward draws the same masks."""

    def __init__(self, model: nn.Module) -> None:
        self.wanted = False
        self.number = next(_numbers)
        self.anchor = torch.zeros(1, device=device_of(model))
        _REPLAYS[self.number] = self
        self._draws: GlobalDraws | None = None
        self._handle = model.register_forward_pre_hook(self._remember)

    def _remember(self, module: nn.Module, inputs: Any) -> None:
        if not torch.compiler.is_compiling():
            self.look()
        elif not self.asleep and torch.is_grad_enabled():
            remember_rng(self.anchor, self.number)

    def look(self) -> None:
        """Remember the present state of the generators, if it is wanted."""
        if torch.is_grad_enabled():
            self.remember()

    def remember(self) -> None:
        """The same of a forward that is known to keep a graph."""
        if self.wanted:
            self._draws = GlobalDraws()

    @contextmanager
    def again(self) -> Iterator[None]:
        """Within: the generators as before the last forward; afterwards: as they were before entering."""
        with global_draws_kept():
            if self._draws is not None:
                self._draws.put_back()
            yield

    @contextmanager
    def resting(self) -> Iterator[None]:
        """Within: a compiled forward remembers nothing, because it is such another one."""
        asleep, self.asleep = self.asleep, True
        try:
            yield
        finally:
            self.asleep = asleep

    def close(self) -> None:
        """Take the hook off the model."""
        self._handle.remove()


_REPLAYS: WeakValueDictionary[int, DropoutReplay] = WeakValueDictionary()
_numbers = count()


@torch.library.custom_op("esper::remember_rng", mutates_args=("anchor",), tags=(torch.Tag.cudagraph_unsafe,))
def remember_rng(anchor: Tensor, number: int) -> None:
    """``DropoutReplay.remember`` in a compiled host's graph; ``anchor`` is said to change, so that the op is not dropped.

    It works on the host, so a captured graph (``mode="reduce-overhead"``) is divided before it and does not replay without it.
    """
    replay = _REPLAYS.get(number)
    if replay is not None:
        replay.remember()


#: Where every look at data begins to draw from, so that any two looks draw the same.
LOOK = seed_for(0, "a look at data")


@contextmanager
def drawing_alike(data: Any) -> Iterator[None]:
    """Within, an iteration over ``data`` repeats the draws of the last one; every generator is put back afterwards.

    A DataLoader draws a base seed at every iteration, shuffled or not, from its own generator or from the global one.
    """
    own = _generators_of(data)
    with global_draws_kept():
        before = [(one, one.get_state()) for one in own]
        seed_global_draws(LOOK)
        for one in own:
            one.manual_seed(LOOK)
        try:
            yield
        finally:
            for one, state in before:
                one.set_state(state)


def _generators_of(data: Any) -> list[torch.Generator]:
    """The generators that a loader and its samplers have been given."""
    sampler = getattr(data, "sampler", None)
    batches = getattr(data, "batch_sampler", None)
    holders = (data, sampler, batches, getattr(batches, "sampler", None), getattr(data, "dataset", None))
    found = {id(one): one for one in (getattr(holder, "generator", None) for holder in holders) if isinstance(one, torch.Generator)}
    return list(found.values())


def host_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Buffers of the host, by name; those of the seeds are not its."""
    return {name: buffer for name, buffer in model.named_buffers() if f"{ATTRIBUTE}." not in name}


def host_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters of the host, by name; those of the branches are not its."""
    return {name: parameter for name, parameter in model.named_parameters() if f"{ATTRIBUTE}." not in name}


@contextmanager
def untouched_buffers(model: nn.Module) -> Iterator[None]:
    """Within, forwards may move buffers (norm statistics); afterwards every buffer, seeds' too, is as before. Nothing runs compiled."""
    before = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        with uncompiled():
            yield
    finally:
        with torch.no_grad():
            for module, name, buffer, value in before:
                module._buffers[name] = buffer  # a forward may have put another tensor in its place
                buffer.copy_(value)


def to_device(batch: Any, device: torch.device) -> Any:
    """Tensors of a batch (tensor, tuple, list or mapping, nested) on ``device``."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        values = [to_device(value, device) for value in batch]
        return type(batch)(*values) if hasattr(batch, "_fields") else type(batch)(values)
    return batch


def shapes_of(batch: Any) -> tuple[Any, ...]:
    """Shapes of the tensors in a batch, as a hashable key."""
    if isinstance(batch, Tensor):
        return tuple(batch.shape)
    if isinstance(batch, Mapping):
        return tuple((key, shapes_of(value)) for key, value in batch.items())
    if isinstance(batch, (tuple, list)):
        return tuple(shapes_of(value) for value in batch)
    return ()


def freeze_statistics(model: nn.Module) -> None:
    """Evaluation mode for the layers that keep running statistics, so that training does not move them."""
    for module in model.modules():
        if getattr(module, "running_mean", None) is not None:
            module.eval()
