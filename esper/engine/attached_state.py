"""The state of a ``Grow`` in somebody else's loop, for ``attach(state=…)`` to go on from with the same bits.

The host and its optimizer are the loop's own to save and to load, before it attaches.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from esper.checkpoint import store
from esper.checkpoint.tree import kept
from esper.engine.port import memory_of
from esper.engine.state import Tree, grow_state
from esper.errors import UserError
from esper.seeds.layer import ATTRIBUTE, Attached

if TYPE_CHECKING:
    from esper.engine.grow import Grow


NOTHING = "seeds were not attached yet"


def attached_state(grow: Grow) -> Tree:
    """Everything by reference: seeds, branches and their lives, the rates they follow, the judge's batches, the controller's memory."""
    recent = [] if grow.judge is None else [_packed(batch) for batch in grow.judge.recent]
    return {
        "grow": grow_state(grow),
        "initial_lr": list(grow.rate.initial),
        "peak_lr": grow.rate.peak,
        "recent": [] if None in recent else recent,  # batches of kinds of the user's own: the judge gathers others
        "controller": memory_of(grow.port),
    }


def take_over(grow: Grow, state: Tree) -> None:
    """The batches that the judge remembers; a state of esper's own trainer has none of them."""
    for batch in kept(state.get("recent", [])):
        if grow.judge is not None:
            grow.judge.remember(_unpacked(batch, grow.device))


def read_state(state: Tree | str | Path) -> Tree:
    """The state itself, or the one in a checkpoint, or in the newest of a folder of them. Raises UserError where there is none."""
    if isinstance(state, Mapping) or state is None:
        return _of_grow(state, "The state")
    place = Path(state)
    if not (place / store.MANIFEST).is_file():
        kept = store.checkpoints(place)
        if not kept:
            raise UserError(f"There is nothing in {place} to go on from; give what save_branches wrote, its folder, or no state.")
        place = kept[-1]
    return _of_grow(store.read(place)[1], str(place))


def _of_grow(state: Any, where: str) -> Tree:
    """The state, if it is what ``attached_state`` makes."""
    if isinstance(state, Mapping) and "grow" in state:
        return dict(state)
    whole = isinstance(state, Mapping) and "trainer" in state
    what = "is a whole run's checkpoint, which esper resume= and fork= go on from" if whole else "does not hold seeds and branches"
    raise UserError(f"{where} {what}; give what grow.state() returned or grow.save_branches wrote.")


def grown_in(checkpoint: Mapping[str, Any]) -> Any:
    """What a callback left under ``esper`` in another trainer's checkpoint; None before anything could grow.

    Raises UserError where there was no callback.
    """
    if not checkpoint.get("esper"):
        raise UserError("This checkpoint was saved without a GrowCallback and holds nothing that grew; begin anew with its weights.")
    return None if checkpoint["esper"] == NOTHING else checkpoint["esper"]


def keep_in(checkpoint: dict[str, Any], grow: Grow | None) -> None:
    """Leave in another trainer's checkpoint the host's tensors under their own names, and what grew beside them.

    Lightning keeps the model's own tensors elsewhere while an average has its place; its finders save before anything is attached.
    """
    for name in {"state_dict", "current_model_state"} & checkpoint.keys():
        checkpoint[name] = host_alone(checkpoint[name])
    checkpoint["esper"] = NOTHING if grow is None else grow.state()


def found(name: str, *places: Path) -> Path:
    """``name`` in the first of the folders that has it. Raises UserError where none has: what grew is told apart by its name."""
    for place in places:
        if (place / name).is_dir():
            return place / name
    looked = ", ".join(dict.fromkeys(str(place) for place in places if place.name))
    raise UserError(f"What grew is in none of {looked}: take an earlier checkpoint, or say GrowCallback(resume_from=<where this one is>).")


class HostAlone(Attached):
    """Leaves what the seeds hold out of a model's ``state_dict()``; an object of its own, since torch writes on this hook."""

    @classmethod
    def on(cls, model: nn.Module) -> RemovableHandle:
        """From now until the handle is removed, ``model.state_dict()`` is the host's alone."""
        return model.register_state_dict_post_hook(cls())

    def __call__(self, model: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        for name in state.keys() - host_alone(state).keys():
            del state[name]


def host_alone(state: Mapping[str, Any]) -> dict[str, Any]:
    """Of a state dict what is the host's own."""
    return {name: value for name, value in state.items() if f"{ATTRIBUTE}." not in name}


def forgive_seeds(model: nn.Module, keys: Any) -> None:
    """A hook for after ``load_state_dict``: what the seeds hold comes apart from the host's tensors, so it is not missed."""
    keys.missing_keys[:] = [name for name in keys.missing_keys if f"{ATTRIBUTE}." not in name]


def _packed(batch: Any) -> Any:
    """The batch with its kinds of containers told, None for one that could not be built again."""
    if batch is None or isinstance(batch, (Tensor, str, int, float)):
        return ["value", batch]
    kind = "list" if type(batch) is list else "tuple" if type(batch) is tuple else "dict" if isinstance(batch, Mapping) else ""
    parts = dict(batch) if kind == "dict" else dict(enumerate(batch)) if kind else {}
    packed = {str(key): _packed(part) for key, part in parts.items()}
    if not kind or None in packed.values() or (kind == "dict" and not all(isinstance(key, str) for key in parts)):
        return None
    return [kind, packed]


def _unpacked(packed: Any, device: Any) -> Any:
    kind, held = packed
    if kind == "value":
        return held.to(device) if isinstance(held, Tensor) else held
    parts = {key: _unpacked(part, device) for key, part in held.items()}
    return parts if kind == "dict" else tuple(parts.values()) if kind == "tuple" else list(parts.values())


def plain(path: str | Path) -> dict[str, Any]:
    """A checkpoint of another library as tensors and plain values; whatever else its file asks for is not done. Raises UserError."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch has no common base for what it raises on a foreign file
        raise UserError(
            f"{path} cannot be read as tensors and plain values, so nothing in it was used; take a checkpoint that was saved with "
            "this callback."
        ) from error
    return found if isinstance(found, dict) else {}
