"""The versions of the checkpoint format; older checkpoints are upgraded on reading, one version after the other.

A new ``SCHEMA`` needs an entry in ``UPGRADES`` for the version before, and a sample of that in ``tests/checkpoint/samples``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Tree = dict[str, Any]
SCHEMA = 7


def _unchanged(tree: Tree) -> Tree:
    return tree


@dataclass(frozen=True)
class Upgrade:
    """The step from one version to the next, for manifest and state. Neither function changes its argument."""

    manifest: Callable[[Tree], Tree] = _unchanged
    state: Callable[[Tree], Tree] = _unchanged


def _one_hash_a_part(manifest: Tree) -> Tree:
    """Up to version 1 a part had one SHA-256 over all of it: one piece."""
    parts = {name: {**part, "piece": max(1, part["bytes"]), "sha256": [part["sha256"]]} for name, part in manifest["parts"].items()}
    return {**manifest, "parts": parts}


def _said_nothing(state: Tree) -> Tree:
    """Up to version 2 the alerts that had been given were not saved: earlier ones are given once more."""
    grown = {**state, "grow": {**state["grow"], "said": []}} if "grow" in state else state
    return {**grown, "trainer": _said_nothing({**state["trainer"], "said": []})} if "trainer" in state else grown


def _guarded(state: Tree) -> Tree:
    """Up to version 3 there was one snapshot for every rollback and no guard, which begins with the branches that are blended then."""
    grown = {**state, "grow": _with_guard(state["grow"])} if "grow" in state else state
    return {**grown, "trainer": _guarded(state["trainer"])} if "trainer" in state else grown


def _with_guard(grow: Tree) -> Tree:
    kept = {name: value for name, value in grow.items() if name != "snapshot"}
    return {**kept, "guard": {"states": [], "calm": None, "lowest": math.inf, "sound": {}}}


def _of_unknown_origin(state: Tree) -> Tree:
    """Up to version 4 a run told neither its data nor the versions that computed it; topologies named no module's class, and need not."""
    return {**state, "data": "", "versions": {}} if "trainer" in state else state


def _without_dead_columns(state: Tree) -> Tree:
    """Up to version 5 the table of seeds had three unused columns: the branches know their blueprint and strategy."""
    if "trainer" in state:
        return {**state, "trainer": _without_dead_columns(state["trainer"])}
    if "grow" not in state:
        return state
    registry = state["grow"]["garden"]
    table = {name: column for name, column in registry["table"].items() if name not in ("parent", "strategy", "blueprint")}
    return {**state, "grow": {**state["grow"], "garden": {**registry, "table": table}}}


def _read_at_once(state: Tree) -> Tree:
    """Up to version 6 no gradient norm or error rate of a step was read in the next one, so none had to be saved."""
    if "trainer" in state:
        return {**state, "trainer": _read_at_once(state["trainer"])}
    return {**state, "grow": {"norms": {}, "rates": {}, **state["grow"]}} if "grow" in state else state


#: The upgrade from each version to the next one.
UPGRADES: dict[int, Upgrade] = {
    1: Upgrade(manifest=_one_hash_a_part),
    2: Upgrade(state=_said_nothing),
    3: Upgrade(state=_guarded),
    4: Upgrade(state=_of_unknown_origin),
    5: Upgrade(state=_without_dead_columns),
    6: Upgrade(state=_read_at_once),
}


def manifest_of_today(manifest: Tree) -> Tree:
    """A verified manifest in the form of ``SCHEMA``; its ``schema`` is still that of the state on disk."""
    for version in range(manifest["schema"], SCHEMA):
        manifest = UPGRADES[version].manifest(manifest)
    return manifest


def state_of_today(state: Tree, schema: int) -> Tree:
    """A state of version ``schema`` in the form of ``SCHEMA``."""
    for version in range(schema, SCHEMA):
        state = UPGRADES[version].state(state)
    return state
