"""The run that another one continues: its folder, its configuration, and the state that a resumed run or a fork begins with."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from esper.checkpoint import disk
from esper.checkpoint.tree import fitting
from esper.config import GROUPS, PRESETS, RootConfig, build, config_hash
from esper.errors import UserError
from esper.report.summary_file import NAME as SUMMARY
from esper.report.summary_file import read_summary
from esper.running.builders import build_controller
from esper.running.provenance import no_provenance
from esper.running.run_folder import CONFIG, LOCK, hash_of, read_config, status

State = dict[str, Any]


@dataclass
class Start:
    """A run about to continue: its config, its folder, and the state that it begins with (None: the beginning)."""

    config: RootConfig
    folder: Path
    state: Any


def unfinished(config: RootConfig, named: Path | None = None) -> Path | None:
    """The newest unfinished run of exactly this configuration, under ``config.output`` or in the folder ``named``.

    Unreadable folders are skipped with a message. Raises UserError while a process is running such a run, since both continuing
    it and starting over would do the same work twice.
    """
    wanted, output = config_hash(config), Path(config.output)
    folders = {path.parent.resolve() for path in (*_at_depths(output, LOCK), *_at_depths(output, SUMMARY))}
    if named is not None and named.is_dir():
        folders.add(named.resolve())
    found: list[Path] = []
    for folder in folders:
        try:
            ended = status(folder) if hash_of(folder) == wanted else "NEW"
        except (UserError, OSError) as error:
            print(f"esper: {error}", file=sys.stderr)
            continue
        if ended == "RUNNING":
            raise UserError(
                f"A run of this very configuration is under way in {folder}: wait for it, or end it first. Without resume=auto "
                "another one begins beside it."
            )
        if ended not in ("NEW", "FINISHED") and (folder / CONFIG).exists():
            found.append(folder)
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def _at_depths(output: Path, name: str) -> list[Path]:
    """Files of this name in run folders: ``<day>/<run>``, ``sweeps/<day>/<sweep>/<job>``, or the folder itself."""
    return [path for pattern in (name, f"*/{name}", f"*/*/{name}", f"*/*/*/{name}", f"*/*/*/*/{name}") for path in output.glob(pattern)]


def saved_run(place: Path) -> tuple[Path, Path | None, RootConfig, str]:
    """(run folder, checkpoint or None, the run's own configuration, its status) for a path to a run or to one of its checkpoints."""
    folder, chosen = locate(place)
    return folder, chosen, build(*saved_config(folder)), status(folder)


def locate(place: Path) -> tuple[Path, Path | None]:
    """(run folder, checkpoint or None) for a path to either."""
    if (place / CONFIG).exists():
        return place.resolve(), None
    if not (place / disk.MANIFEST).exists():
        raise UserError(f"{place} is no run's folder (it has no {CONFIG}) and no checkpoint; name one, or use resume=auto.")
    folder = place.resolve().parent.parent
    if place.resolve().parent.name != disk.FOLDER or not (folder / CONFIG).exists():
        raise UserError(
            f"{place} is a checkpoint apart from its run, whose {CONFIG} says how to go on: put it back as "
            f"<run folder>/{disk.FOLDER}/<step> and name that. What grow.save_branches wrote is for "
            "attach(state=…) and grow.load_branches."
        )
    return folder, place.resolve()


def saved_config(folder: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The run's configuration as plain values, and the presets that it was composed with."""
    tree = read_config(folder)
    if missing := [group for group in GROUPS if group not in tree]:
        raise UserError(f"{folder / CONFIG} ends too early: it has no {missing[0]}; restore it, or start a new run.")
    choices = {preset: str(tree.pop(preset, "") or "") for preset in PRESETS}
    return {key: value for key, value in tree.items() if value is not None}, choices


def is_over(folder: Path, chosen: Path | None) -> bool:
    """Whether the run finished, and the ``chosen`` checkpoint, if any, is the one of its end."""
    if status(folder) != "FINISHED":
        return False
    return chosen is None or disk.read_manifest(chosen).step >= int(read_summary(folder)["steps"])


def total_steps(config: RootConfig) -> int:
    """Optimizer steps of a run; the data are read where it is given in epochs."""
    steps: int = config.trainer.steps or config.trainer.total_steps(len(config.task.build().train))
    return steps


def saved_state(folder: Path, chosen: Path | None, fall_back: bool) -> Any:
    """The state of the checkpoint ``chosen``, else of the newest; with ``fall_back`` damaged ones are skipped. None if there is none."""
    if chosen is not None:
        return disk.read(chosen)[1]
    kept = disk.checkpoints(folder / disk.FOLDER)
    if fall_back or not kept:
        return state_in(folder)
    return disk.read(kept[-1])[1]


def state_in(folder: Path) -> Any:
    """The state in a run's newest complete checkpoint, None if it has no checkpoint; prints a sentence for each that is skipped.

    Raises UserError if there are checkpoints and none is complete.
    """
    found = disk.newest(folder / disk.FOLDER)
    for refusal in found[2] if found else ():
        print(f"esper: {refusal}", file=sys.stderr)
    return None if found is None else found[1]


def fork_state(state: State, before: RootConfig, config: RootConfig) -> tuple[State, list[str]]:
    """(the state that a run of ``config`` begins with, a sentence for each part of it that begins again).

    A fork takes over the whole saved state, except that of an optimizer or a controller that it replaces by another.

    ``before`` is the configuration of the run that saved ``state``. Raises UserError for a state that is not a run's.
    """
    with fitting():
        state, said = {**state, **no_provenance()}, []
        if _kind(config.optimizer) != _kind(before.optimizer):
            anew = "muon" in (_kind(config.optimizer), _kind(before.optimizer))
            state["trainer"] = _without_optimizer(state["trainer"], anew)
            said.append(f"optimizer={_kind(config.optimizer)} begins without what {_kind(before.optimizer)} had gathered")
        if _kind(config.controller) != _kind(before.controller):
            state["controller"] = json.dumps(_new_controller(config, state["trainer"]["grow"]))
            said.append(f"controller={_kind(config.controller)} begins without the memory of {_kind(before.controller)}")
        return state, said


def _kind(part: Any) -> str:
    """The option of a group, with its target where that is ``custom``."""
    target = getattr(part, "target", "")
    return f"{part.name} {target}" if target else str(part.name)


def _without_optimizer(trainer: State, branches: bool) -> State:
    """The host's optimizer has seen no gradient yet, in every snapshot that a rollback may return to as well.

    Nor has that of the ``branches``, where they learn by other rules than before: the moments of AdamW mean nothing to Muon.
    """
    grow, governor = trainer["grow"], trainer["governor"]
    guard = grow["guard"]
    states = [{**kept, "snapshot": _emptied(kept["snapshot"], branches)} for kept in guard["states"]]
    if governor is not None and governor["snapshot"] is not None:
        governor = {**governor, "snapshot": _emptied(governor["snapshot"], branches)}
    if branches:
        grow = {**grow, "garden": {**grow["garden"], "banks": _unlearnt(grow["garden"]["banks"])}}
    return {**_emptied(trainer, False), "grow": {**grow, "guard": {**guard, "states": states}}, "governor": governor}


def _emptied(holder: State, branches: bool) -> State:
    emptied = {**holder, "optimizer": None if holder["optimizer"] is None else [{} for _ in holder["optimizer"]]}
    return {**emptied, "branches": _unlearnt(holder["branches"])} if branches else emptied


def _unlearnt(tree: Any, name: str = "") -> Any:
    """Branches as banks and snapshots keep them, with moments and steps of zero; ``rows`` are ``[value, first, second]``."""
    if name in ("moments", "steps"):
        return _zeros(tree)
    if name == "rows":
        return {kind: [values[0], *_zeros(values[1:])] for kind, values in tree.items()}
    return {key: _unlearnt(value, key) for key, value in tree.items()} if isinstance(tree, dict) else tree


def _zeros(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _zeros(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_zeros(value) for value in tree]
    return torch.zeros_like(tree) if isinstance(tree, torch.Tensor) else 0


def _new_controller(config: RootConfig, grow: State) -> Any:
    """The state of a new controller that has decided nothing, but knows the stages of the seeds."""
    fresh = build_controller(config, config.task.build()).state()
    if isinstance(fresh, dict) and "view" in fresh:
        seeds = [(site["name"], seed) for site in grow["topology"]["sites"] for seed in range(site["seeds"])]
        stages = grow["garden"]["table"]["stage"].tolist()
        fresh["view"] = {"stages": [[*seed, stage] for seed, stage in zip(seeds, stages, strict=True)]}
    return fresh
