"""Saved states of seeds and branches: reading one, checking that it fits a model, and separating the host's tensors from the seeds'.

The loop itself saves the host and its optimizer, and loads them before it attaches.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from esper.checkpoint import disk
from esper.checkpoint.shards import take_out, write
from esper.distributed import Ranks
from esper.distributed.sharding import class_name
from esper.engine.extra_passes import host_buffers, host_parameters
from esper.errors import UserError
from esper.seeds import SeedRegistry
from esper.seeds.layer import ATTRIBUTE, ModelHook

Tree = dict[str, Any]


def read_state(state: Tree | str | Path) -> Tree:
    """The state itself, or the one in a checkpoint, or in the newest of a folder of them. Raises UserError where there is none."""
    if isinstance(state, Mapping) or state is None:
        return _of_grow(state, "The state")
    place = Path(state)
    if not (place / disk.MANIFEST).is_file():
        kept = disk.checkpoints(place)
        if not kept:
            raise UserError(f"There is nothing in {place} to go on from; give what save_branches wrote, its folder, or no state.")
        place = kept[-1]
    return _of_grow(disk.read(place)[1], str(place))


def _of_grow(state: Any, where: str) -> Tree:
    """The state, if ``Grow.state`` made it."""
    if isinstance(state, Mapping) and "grow" in state:
        return dict(state)
    whole = isinstance(state, Mapping) and "trainer" in state
    what = "is a whole run's checkpoint, which esper resume= and fork= go on from" if whole else "does not hold seeds and branches"
    raise UserError(f"{where} {what}; give what grow.state() returned or grow.save_branches wrote.")


def write_state(state: Tree, folder: Path, step: int, tick: int, registry: SeedRegistry, ranks: Ranks) -> Path:
    """Write a ``state`` as a checkpoint of ``step``, and return its path; of a sharded host each process writes its parts of it."""
    place = None
    if ranks.sharded:
        state, shards = take_out(state)
        place = folder / ".shards"
        if ranks.first:
            disk.discard(place)
        ranks.all_agree("a place for shards", True)
        write(shards, place, ranks.group)
    path = folder / f"{step:09d}"
    if ranks.first or not ranks.sharded:
        path = disk.write(disk.copy(state, step, tick, topology(registry), None, place), folder).path
    if ranks.sharded:
        ranks.all_agree("a saved state", True)
    return path


def refuse_scattered(ranks: Ranks) -> None:
    """Raise UserError where a state in one process's memory would be of a sharded host."""
    if ranks.sharded:
        raise UserError("No process has the whole state of a host that FSDP shards: use grow.save_branches(folder) in all processes.")


def topology(registry: SeedRegistry) -> Tree:
    """The parts that must agree before a tensor is loaded: the host's tensors and modules' classes, the sites and seeds (JSON-able).

    A module is known by its class alone: a function called in ``forward`` is not seen.
    """
    model = registry.model
    named = {**host_parameters(model), **host_buffers(model)}
    host = {name: [str(value.dtype).removeprefix("torch."), list(value.shape)] for name, value in named.items()}
    modules = {name: class_name(module) for name, module in model.named_modules() if ATTRIBUTE not in name.split(".")}
    return {"host": host, "modules": modules, **registry.topology()}


def refuse_misfit(saved: Any, present: Tree, where: str) -> None:
    """Raise UserError, naming the first difference, unless both topologies are the same."""
    there, here = (dict(side) if isinstance(side, dict) else {} for side in (saved, present))
    if "modules" not in there:  # saved before schema 5
        here.pop("modules", None)
    if there == here:
        return
    reason = "it describes another kind of run"
    for key in ("host", "modules", "sites", "blueprint", "silent"):
        if there.get(key) != here.get(key):
            reason = _difference(key, there.get(key), here.get(key))
            break
    raise UserError(f"{where} does not fit this run: {reason}; build the same host and sites, or start a new run.")


def _difference(key: str, there: Any, here: Any) -> str:
    if key == "host" and isinstance(there, dict) and isinstance(here, dict):
        for name in sorted({*there, *here}):
            if there.get(name) != here.get(name):
                return f"the host's '{name}' is {_shape(there.get(name))} there and {_shape(here.get(name))} here"
    if key == "modules" and isinstance(there, dict) and isinstance(here, dict):
        for name in sorted({*there, *here}):
            if there.get(name) != here.get(name):
                return f"the host's module '{name}' is {there.get(name, 'absent')} there and {here.get(name, 'absent')} here"
    if key == "sites" and isinstance(there, list) and isinstance(here, list):
        for old, new in zip(there, here, strict=False):
            if old != new:
                return f"it has a site {old} where this run has {new}"
        return f"it has {len(there)} sites and this run {len(here)}"
    return f"its {key} is {there!r} and this run's {here!r}"


def _shape(entry: Any) -> str:
    return "absent" if entry is None else f"{entry[0]} {entry[1]}"


class HostAlone(ModelHook):
    """Leaves the seeds' tensors out of a model's ``state_dict()``; an object, since torch writes attributes on this hook."""

    @classmethod
    def on(cls, model: nn.Module) -> RemovableHandle:
        """From now until the handle is removed, ``model.state_dict()`` is the host's alone."""
        handle: RemovableHandle = model.register_state_dict_post_hook(cls())
        return handle

    def __call__(self, model: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        for name in state.keys() - host_alone(state).keys():
            del state[name]


def host_alone(state: Mapping[str, Any]) -> dict[str, Any]:
    """The host's own part of a state dict."""
    return {name: value for name, value in state.items() if f"{ATTRIBUTE}." not in name}


def expect_host_alone(model: nn.Module) -> None:
    """From now on ``model.load_state_dict()`` misses no tensor of the seeds: they come apart from the host's."""
    model.register_load_state_dict_post_hook(_forgive_seeds)


def _forgive_seeds(model: nn.Module, keys: Any) -> None:
    keys.missing_keys[:] = [name for name in keys.missing_keys if f"{ATTRIBUTE}." not in name]
