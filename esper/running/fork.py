"""What of a saved state a fork takes over: all of it, but for the memory of an optimizer or a controller that it replaces by another."""

from __future__ import annotations

import json
from typing import Any

from esper.checkpoint.tree import fitting
from esper.config import RootConfig
from esper.running.builders import build_controller
from esper.running.provenance import unknown_origin

State = dict[str, Any]


def forked(state: State, before: RootConfig, config: RootConfig) -> tuple[State, list[str]]:
    """(the state that a run of ``config`` begins with, a sentence for each part of it that begins anew).

    ``before`` is the configuration of the run that saved ``state``. Raises UserError for a state that is not a run's.
    """
    with fitting():
        state, said = {**state, **unknown_origin()}, []
        if _kind(config.optimizer) != _kind(before.optimizer):
            state["trainer"] = _without_optimizer(state["trainer"])
            said.append(f"optimizer={_kind(config.optimizer)} begins without what {_kind(before.optimizer)} had gathered")
        if _kind(config.controller) != _kind(before.controller):
            state["controller"] = json.dumps(_new_controller(config, state["trainer"]["grow"]))
            said.append(f"controller={_kind(config.controller)} begins without the memory of {_kind(before.controller)}")
        return state, said


def _kind(part: Any) -> str:
    """The option of a group, and of ``custom`` what it builds."""
    target = getattr(part, "target", "")
    return f"{part.name} {target}" if target else str(part.name)


def _without_optimizer(trainer: State) -> State:
    """The host's optimizer has seen no gradient yet, in every snapshot that a rollback may return to as well."""
    grow, governor = trainer["grow"], trainer["governor"]
    guard = grow["guard"]
    states = [{**kept, "snapshot": _emptied(kept["snapshot"])} for kept in guard["states"]]
    if governor is not None and governor["snapshot"] is not None:
        governor = {**governor, "snapshot": _emptied(governor["snapshot"])}
    return {**_emptied(trainer), "grow": {**grow, "guard": {**guard, "states": states}}, "governor": governor}


def _emptied(holder: State) -> State:
    return {**holder, "optimizer": None if holder["optimizer"] is None else [{} for _ in holder["optimizer"]]}


def _new_controller(config: RootConfig, grow: State) -> Any:
    """The state of a controller that has decided nothing, but sees the stages that the seeds are in."""
    fresh = build_controller(config, config.task.build()).state()
    if isinstance(fresh, dict) and "view" in fresh:
        seeds = [(site["name"], seed) for site in grow["topology"]["sites"] for seed in range(site["seeds"])]
        stages = grow["garden"]["table"]["stage"].tolist()
        fresh["view"] = {"stages": [[*seed, stage] for seed, stage in zip(seeds, stages, strict=True)]}
    return fresh
