"""The checks of a saved model's ``model.json``, and of the memory it may ask for: as much as its weights fill.

The file may come from anywhere. Every content ends in a model or in a sentence, and builds nothing larger than the weights beside it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from esper.blueprints import Geometry

GEOMETRY = {field.name for field in dataclasses.fields(Geometry)}

#: Axes of positions behind the features that a site may have: none, those of a series, an image or a volume.
MOST_SPATIAL = 3


MORE = "the host and what grew in it would hold more than the file of weights"


class Wrong(ValueError):
    """The error in a description, in words."""


def check(description: dict[str, Any]) -> None:
    """Raise Wrong unless every part of a description is of the kind that ``save_model`` writes."""
    if "host" not in description:
        raise Wrong("host is missing")
    if description["host"] is not None:
        _check_host(_is(description["host"], dict, "host"))
    for cards in _is(description.get("grown"), list, "grown"):
        for card in _is(cards, list, "grown"):
            _check_card(_is(card, dict, "grown"))
    for name, source in _is(description.get("tied"), dict, "tied").items():
        _is(source, str, f"tied.{name}")
    for name, dtype in _is(description.get("unsaved", {}), dict, "unsaved").items():
        if not isinstance(getattr(torch, _is(dtype, str, f"unsaved.{name}"), None), torch.dtype):
            raise Wrong(f"unsaved.{name} is '{dtype}', which is no dtype")
    digest = description.get("sha256", "")
    if description.get("version") != 1 and not (isinstance(digest, str) and len(digest) == 64):
        raise Wrong("sha256 is no SHA-256")


def _check_host(host: dict[str, Any]) -> None:
    _is(_is(host.get("model"), dict, "host.model").get("name"), str, "host.model.name")
    task = _is(host.get("task"), dict, "host.task")
    for key in ("name", "inputs"):
        _is(task.get(key), str, f"host.task.{key}")
    for size in _is(task.get("input_shape"), list, "host.task.input_shape"):
        _count(size, "host.task.input_shape")
    _count(task.get("outputs"), "host.task.outputs")


def _check_card(card: dict[str, Any]) -> None:
    _is(card.get("site"), str, "site")
    if "heads" in card:
        _count(card["heads"], "heads")
        return
    if "ranks" in card:
        for key in ("ranks", "reads", "width"):
            _count(card.get(key), key)
        _is(card.get("folded"), bool, "folded")
        return
    if "hidden" in card:
        _is(card["hidden"], str, "hidden")
        _is(card.get("norm"), str, "norm")
        _count(card.get("units"), "units")
        return
    _count(card.get("width"), "width")
    if type(card.get("dim")) is not int or not -1 - MOST_SPATIAL <= card["dim"] < 0:
        raise Wrong(f"dim is {card.get('dim')!r}, which is no axis counted from the end")
    if _is(card.get("folded"), bool, "folded"):
        _is(card.get("bias"), bool, "bias")
        return
    branches = _is(card.get("branches"), list, "branches")
    if not branches:
        raise Wrong("a site without branches stands among those that grew")
    for entry in branches:
        _check_branch(_is(entry, dict, "branches"), card)


def _check_branch(entry: dict[str, Any], card: dict[str, Any]) -> None:
    _is(entry.get("blueprint"), str, "blueprint")
    alpha = entry.get("alpha")
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
        raise Wrong(f"alpha is {alpha!r}, which is no finite number")
    _is(entry.get("residual"), bool, "residual")
    if _is(entry.get("block"), bool, "block"):
        _count(entry.get("blocks", 1), "blocks")
        return
    _is(entry.get("target"), str, "target")
    _is(entry.get("settings"), dict, "settings")
    geometry = _is(entry.get("geometry"), dict, "geometry")
    if set(geometry) != GEOMETRY:
        raise Wrong(f"geometry holds {', '.join(map(str, geometry)) or 'nothing'} instead of {', '.join(sorted(GEOMETRY))}")
    for key in ("width", "seeds", "positions"):
        _count(geometry[key], f"geometry.{key}")
    _is(geometry["residual"], bool, "geometry.residual")
    if geometry["dim"] not in (-1, 1) or type(geometry["spatial"]) is not int or not 0 <= geometry["spatial"] <= MOST_SPATIAL:
        raise Wrong("geometry.dim or geometry.spatial is no such axis")
    if geometry["width"] != card["width"] or geometry["seeds"] > geometry["width"]:
        raise Wrong("geometry.width is not the site's, or less than geometry.seeds")
    if type(entry.get("seed")) is not int or not -1 <= entry["seed"] < geometry["seeds"]:
        raise Wrong(f"seed is {entry.get('seed')!r}, and the site has {geometry['seeds']}")


def _is(value: Any, kind: type, name: str) -> Any:
    if type(value) is not kind:
        words = {dict: "keys with values", list: "a list", str: "a text", bool: "true or false"}[kind]
        raise Wrong(f"{name} is {'missing' if value is None else type(value).__name__} where it must be {words}")
    return value


def _count(value: Any, name: str) -> None:
    if type(value) is not int or value < 1:
        raise Wrong(f"{name} is {str(value)[:40]!r} where it must be a whole number of at least 1")


class Budget:
    """How much may still be built: as many numbers as the file holds, and, in copies of the host's blocks, as many tensors."""

    def __init__(self, tensors: dict[str, Tensor], tied: dict[str, str]) -> None:
        held = [*tensors.values(), *(tensors[source] for source in tied.values() if source in tensors)]
        self.tensors, self.numbers = len(held), sum(value.numel() for value in held)

    def spend(self, shapes: Iterable[tuple[int, ...]]) -> None:
        """Raise Wrong where tensors of these shapes hold more numbers than are left."""
        for shape in shapes:
            if any(type(size) is not int or size < 0 for size in shape):
                raise Wrong(f"a branch would have a tensor of the shape {shape}")
            self.numbers -= math.prod(shape)
        if self.numbers < 0:
            raise Wrong(MORE)

    def copy(self, module: nn.Module) -> None:
        """Raise Wrong where ``module`` holds more than is left: copies of copies double, a short file asks for any number."""
        values = module.state_dict().values()
        self.tensors -= max(1, len(values))
        if self.tensors < 0:
            raise Wrong(MORE)
        self.spend(tuple(value.shape) for value in values)


def unfit(name: str, given: Tensor, own: Tensor, learnt: bool) -> str | None:
    """Why a saved tensor cannot stand for the host's ``own``, in words, or None; ``learnt`` parameters must be finite."""
    if given.shape != own.shape:
        return f"'{name}' has shape {tuple(given.shape)} in the file and shape {tuple(own.shape)} in the host"
    alike = (given.is_floating_point() and own.is_floating_point()) or (given.is_complex() and own.is_complex()) or given.dtype == own.dtype
    if not alike:
        return f"'{name}' is {given.dtype} in the file and {own.dtype} in the host"
    if given.is_floating_point() or given.is_complex():
        values = given.float() if given.is_floating_point() and given.element_size() == 1 else given
        if bool(values.isnan().any()) or (learnt and not bool(values.isfinite().all())):
            return f"'{name}' holds numbers that are not finite"
    return None
