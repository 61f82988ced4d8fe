"""A policy as a file: a network in the safetensors format, with what it must be given and what it was learnt from beside its weights.

Nothing in it is code, and nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from esper.atomic_files import replacing
from esper.controllers.policy.network import WORDS, PolicyNetwork, Words
from esper.controllers.policy.situation import FEATURES
from esper.errors import UserError
from esper.randomness import generator

FORMAT, VERSION = "esper policy", 1
LARGEST = 1 << 26
"""Bytes of a file that are read."""
_MOST = 4096
"""Hidden units, and words of a kind, that are believed of a file."""
_KEY = "esper"  # one entry: the format writes several in no fixed order, and a file should repeat to the bit


@dataclass(frozen=True)
class Policy:
    """A network, the numbers that say what it was learnt from, and the file's bytes.

    ``learnt`` has ``runs``, ``decisions``, the ``error`` of predicted rewards on runs that it did not see (RMS), and the settings ``rent``
    and ``trend`` of its rewards.
    """

    network: PolicyNetwork
    learnt: dict[str, float]
    data: bytes

    @property
    def digest(self) -> str:
        """Twelve digits that name these weights."""
        return hashlib.sha256(self.data).hexdigest()[:12]


def packed(network: PolicyNetwork, learnt: dict[str, float]) -> Policy:
    """A policy of these weights."""
    from safetensors.torch import save

    words = dict(zip(WORDS, map(list, network.words.all()), strict=True))
    said = {"format": FORMAT, "version": VERSION, "hidden": network.hidden, "words": words, "learnt": learnt}
    said |= {"features": {name: list(features) for name, features in FEATURES.items()}}
    tensors = {name: value.detach().contiguous() for name, value in network.state_dict().items()}
    return Policy(network, learnt, save(tensors, {_KEY: json.dumps(said)}))


def write(policy: Policy, path: Path) -> None:
    """The file, whole or not at all."""
    with replacing(path) as aside:
        aside.write_bytes(policy.data)


def read_file(path: str) -> Policy:
    """The policy in a file. Raises UserError where there is none, or none that this esper can use."""
    if not path:
        raise UserError("controller=policy needs the weights that it decides by: controller.weights=<file>, which esper learn writes.")
    place = Path(path).expanduser()
    if not place.is_file():
        raise UserError(f"controller.weights={path}: there is no such file; esper learn to={path} makes one from recorded runs.")
    try:
        data = place.read_bytes() if place.stat().st_size <= LARGEST else b""
    except OSError as error:
        raise UserError(f"controller.weights={path} cannot be read: {error.strerror}.") from error
    return unpacked(data, f"controller.weights={path}")


def unpacked(data: bytes, name: str) -> Policy:
    """The policy in these bytes; ``name`` is what a refusal calls them. Raises UserError for anything else."""
    from safetensors.torch import load

    try:
        length = int.from_bytes(data[:8], "little")
        said = json.loads(json.loads(data[8 : 8 + length])["__metadata__"][_KEY])
        kind, version = said["format"], said["version"]
    except (ValueError, KeyError, TypeError, RecursionError):
        kind, version, said = "", 0, {}
    if kind != FORMAT:
        raise UserError(f"{name} is no policy that esper learn wrote; name such a file.")
    seen = {key: list(features) for key, features in FEATURES.items()}
    if version != VERSION or said.get("features") != seen:
        raise UserError(f"{name} was learnt by another version of esper, which sees other features; learn it again with esper learn.")
    try:
        network = _network(said)
        network.load_state_dict(load(data), strict=True)
        learnt = {str(key): float(value) for key, value in said["learnt"].items()}
        whole = all(bool(torch.isfinite(value).all()) for value in network.state_dict().values())
        whole = whole and all(map(math.isfinite, learnt.values()))
        if not whole or not {"runs", "decisions", "error", "rent", "trend"} <= learnt.keys():
            raise ValueError("it has numbers that are none, or lacks some")
    except Exception as error:  # safetensors and torch have errors of several kinds for a file that is damaged
        words = " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__
        raise UserError(f"{name} is damaged ({words}); take it from where it was written, or learn it again with esper learn.") from error
    return Policy(network, learnt, data)


def _network(said: dict[str, Any]) -> PolicyNetwork:
    hidden = int(said["hidden"])
    words = Words(*(tuple(str(word) for word in said["words"][key]) for key in WORDS))
    if not 1 <= hidden <= _MOST or not all(1 <= len(one) <= _MOST for one in words.all()):
        raise ValueError("it has a size that no policy has")
    return PolicyNetwork(words, hidden, generator(0, "policy"))
