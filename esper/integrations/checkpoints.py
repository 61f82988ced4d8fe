"""Branches in the checkpoints of another library's trainer: kept beside the host's tensors, and found again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from esper.distributed import is_sharded
from esper.engine.grow import Grow
from esper.engine.saved_state import host_alone
from esper.errors import UserError

NOTHING = "seeds were not attached yet"


def grown_in(checkpoint: Mapping[str, Any]) -> Any:
    """A callback's entry ``esper`` in another trainer's checkpoint; None before anything could grow.

    Raises UserError where there was no callback.
    """
    if not checkpoint.get("esper"):
        raise UserError("This checkpoint was saved without a GrowCallback and holds nothing that grew; begin anew with its weights.")
    return None if checkpoint["esper"] == NOTHING else checkpoint["esper"]


def keep_in(checkpoint: dict[str, Any], grow: Grow | None) -> None:
    """Leave in another trainer's checkpoint the host's tensors under their own names, and the branches beside them.

    Lightning keeps the model's own tensors elsewhere while an average has its place; its finders save before anything is attached.
    """
    for name in {"state_dict", "current_model_state"} & checkpoint.keys():
        checkpoint[name] = host_alone(checkpoint[name])
    checkpoint["esper"] = NOTHING if grow is None else grow.state()


LIGHTNING = (
    "Lightning's checkpoints hold that of one process: use Trainer(enable_checkpointing=False), and save with "
    "callback.grow.save_branches(folder) in all processes."
)
TRANSFORMERS = "this callback keeps that of one: train with DDP, or in a loop of your own with esper.attach."


def not_sharded(model: nn.Module, why: str) -> nn.Module:
    """The model. Raises UserError if FSDP shards it and there is a reason ``why`` the other trainer cannot keep what grows on it."""
    if why and is_sharded(model):
        raise UserError(f"FSDP leaves no process the whole state of what grows here, and {why}")
    return model


def found(name: str, *places: Path) -> Path:
    """``name`` in the first of the folders that has it. Raises UserError where none has: branches are identified by this name."""
    for place in places:
        if (place / name).is_dir():
            return place / name
    looked = ", ".join(dict.fromkeys(str(place) for place in places if place.name))
    raise UserError(f"What grew is in none of {looked}: take an earlier checkpoint, or say GrowCallback(resume_from=<where this one is>).")


def plain(path: str | Path) -> dict[str, Any]:
    """A checkpoint of another library as tensors and plain values; nothing else in its file is executed. Raises UserError."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch has no common base for what it raises on a foreign file
        raise UserError(
            f"{path} cannot be read as tensors and plain values, so nothing in it was used; take a checkpoint that was saved with "
            "this callback."
        ) from error
    return found if isinstance(found, dict) else {}
