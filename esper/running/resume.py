"""``resume=`` and ``fork=``: going on from a checkpoint, with the same bits or, in a new run, with other settings.

``resume=<run folder>`` (or one of its checkpoints) takes the config stored there; ``resume=auto`` looks under ``output`` for
the run of this very configuration that did not end; ``fork=<run folder>`` starts a new run from that state.
"""

from __future__ import annotations

import copy
import logging
import secrets
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from esper.checkpoint import store
from esper.checkpoint.tree import fitting
from esper.cli.terminal import Sentence
from esper.config import GROUPS, PRESETS, RootConfig, build, config_hash, listing
from esper.errors import UserError
from esper.report.summary_file import NAME as SUMMARY
from esper.report.summary_file import read_summary
from esper.running.fork import forked
from esper.running.run_folder import CONFIG, LOCK, hash_of, read_config, refuse_running, status

#: What a resumed run may have otherwise: none of it changes a bit of what was trained so far.
CHANGEABLE = (
    "trainer.steps",
    "trainer.epochs",
    "trainer.device",
    "trainer.num_workers",
    "trainer.control",
    "trainer.keep",
    "trainer.checkpoint_*",
    "controller.deadline_s",
)
WHOLE_GROUPS = ("tracking",)


@dataclass
class Start:
    """A run about to go on: its config, its folder, and the state it begins from (None: from nothing)."""

    config: RootConfig
    folder: Path
    state: Any


def asked(words: Sequence[str]) -> str | None:
    """``resume`` or ``fork`` where the words name a folder to go on from; ``resume=auto`` is the composed config's business."""
    for key in ("resume", "fork"):
        if any(word.startswith(f"{key}=") and word != "resume=auto" for word in words):
            return key
    return None


def main(words: Sequence[str]) -> int:
    """``esper resume=<folder> [overrides]`` or ``esper fork=<folder> [overrides]``; returns the exit code."""
    key = asked(words)
    place = Path(next(word for word in words if word.startswith(f"{key}=")).partition("=")[2])
    others = [word for word in words if not word.startswith(f"{key}=")]
    return go_on(fork(place, others) if key == "fork" else resume(place, others))


def go_on(start: Start) -> int:
    """Train on from there; returns the exit code."""
    from esper.running.run import run

    _log_to(start.folder)
    run(start.config, start.folder, state=start.state)
    return 0


def resume(place: Path, words: Sequence[str] = (), fall_back: bool = False) -> Start:
    """The run in ``place`` (its folder, or one of its checkpoints) as it goes on.

    ``fall_back`` passes over damaged checkpoints to the newest that is whole; else they are refused.
    Raises UserError for a run that is finished or running, and for an override that would change the bits.
    """
    folder, chosen = _locate(place)
    refuse_running(folder)
    tree, choices = _stored(folder)
    refuse_changes(words, folder)
    before, config = _before_and_after(tree, choices, words)
    was, now = _lengths(before, config)
    if now < was:
        raise UserError(
            f"This ends the run at step {now}, and {folder} was to train {was}: with resume= a run only gets longer. To train less "
            f"from its state, in a new run: fork={folder} {' '.join(words)}."
        )
    if now == was and _is_over(folder, chosen):
        key = "steps" if before.trainer.steps else "epochs"
        raise UserError(
            f"The run in {folder} is finished; to train it longer give trainer.{key}=<more than {getattr(before.trainer, key)}>, "
            f"to try other settings from its end fork={folder}."
        )
    return Start(config, folder, _state(folder, chosen, fall_back))


def fork(place: Path, words: Sequence[str] = ()) -> Start:
    """A new run, in a folder of its own, that begins with the state in ``place`` and its settings with ``words`` changed.

    An optimizer or a controller of another kind than the run had begins anew, which is said on stderr. Raises UserError where
    there is no state, or none that fits, or nothing is left to train.
    """
    folder, chosen = _locate(place)
    before, config = _before_and_after(*_stored(folder), words)
    if config.controller.process == "external":
        raise UserError(
            f"A fork has a folder of its own, in which a controller in another process would go on without its memory: resume={folder}"
            " goes on with both; only a run with controller.process=internal can be forked."
        )
    state = _state(folder, chosen, fall_back=False)
    if state is None:
        raise UserError(f"There is no checkpoint in {folder} to fork from; name a run that saved one.")
    state, said = forked(state, before, config)
    with fitting():
        done, total = int(state["trainer"]["steps"]), _length(config)
    if total <= done:
        raise UserError(
            f"The state in {chosen or folder} is that of step {done}, and the fork would end at step {total}, with nothing left to train; "
            f"give trainer.steps=<more than {done}>."
        )
    for sentence in said:
        print(f"esper: {sentence}", file=sys.stderr)
    now = time.strftime("%Y-%m-%d/%H-%M-%S")
    return Start(config, Path(config.output) / f"{now}-{config.name}-{secrets.token_hex(3)}", state)


def unfinished(config: RootConfig, named: Path | None = None) -> Path | None:
    """The newest run of this very configuration that did not come to its end, under ``config.output`` or in the folder ``named``.

    A folder of which that cannot be told is passed over, and said. Raises UserError where a process runs one: beside it, going on
    and beginning anew would both do the same work twice.
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


def auto(config: RootConfig, folder: Path) -> Start | None:
    """What ``resume=auto`` comes to for a composed config that a new run would train in ``folder``: the run that did not end, or None."""
    found = unfinished(config, folder)
    if found is None:
        print(f"resume=auto: no unfinished run of this configuration under {config.output}; a new one begins", file=sys.stderr)
        return None
    print(f"resume=auto: going on in {found}", file=sys.stderr)
    return resume(found, fall_back=True)


def refuse_changes(words: Sequence[str], folder: Path) -> None:
    """Raise UserError for an override that a resumed run may not have."""
    for word in words:
        key = word.partition("=")[0]
        if key.split(".")[0] in WHOLE_GROUPS or any(_matches(key, pattern) for pattern in CHANGEABLE):
            continue
        _changed(_stored(folder)[0], [word])  # what no fork takes either is refused for that
        raise UserError(
            f"{word} would change what this run computes; with resume= only {listing([*CHANGEABLE, *WHOLE_GROUPS])} may change. "
            f"To start a new run from its state with other settings: fork={folder} {word}."
        )


def _matches(key: str, pattern: str) -> bool:
    return key.startswith(pattern[:-1]) if pattern.endswith("*") else key == pattern


def stored(place: Path) -> tuple[Path, Path | None, RootConfig, str]:
    """(run folder, checkpoint or None, the run's own configuration, its status) for a path to a run or to one of its checkpoints."""
    folder, chosen = _locate(place)
    return folder, chosen, build(*_stored(folder)), status(folder)


def _locate(place: Path) -> tuple[Path, Path | None]:
    """(run folder, checkpoint or None) for a path to either."""
    if (place / CONFIG).exists():
        return place.resolve(), None
    if not (place / store.MANIFEST).exists():
        raise UserError(f"{place} is no run's folder (it has no {CONFIG}) and no checkpoint; name one, or use resume=auto.")
    folder = place.resolve().parent.parent
    if place.resolve().parent.name != store.FOLDER or not (folder / CONFIG).exists():
        raise UserError(
            f"{place} is a checkpoint apart from its run, whose {CONFIG} says how to go on: put it back as "
            f"<run folder>/{store.FOLDER}/<step> and name that. What grow.save_branches wrote is for "
            "attach(state=…) and grow.load_branches."
        )
    return folder, place.resolve()


def _stored(folder: Path) -> tuple[dict[str, Any], dict[str, str]]:
    tree = read_config(folder)
    if missing := [group for group in GROUPS if group not in tree]:
        raise UserError(f"{folder / CONFIG} ends too early: it has no {missing[0]}; restore it, or start a new run.")
    choices = {preset: str(tree.pop(preset, "") or "") for preset in PRESETS}
    return {key: value for key, value in tree.items() if value is not None}, choices


def _changed(tree: dict[str, Any], words: Sequence[str]) -> dict[str, Any]:
    """``tree`` with each ``key=value`` or ``group=option`` put in; the checks are ``build``'s."""
    from esper.cli import conf, overrides

    for word in words:
        key, equals, text = word.partition("=")
        if not equals or word.startswith(("-", "~")):
            raise UserError(
                f"'{word}' is no setting, and a run goes on alone: write key=value, as in trainer.steps=4000; a sweep goes on by its own "
                "words with resume=auto."
            )
        if key in GROUPS:
            if text not in conf.options(key):
                raise UserError(f"{key}={text} is no option of the group {key}: choose {listing(conf.options(key))}.")
            tree[key] = yaml.safe_load((conf.folder() / key / f"{text}.yaml").read_text(encoding="utf-8"))
            continue
        node, leaf = _place(tree, key)
        value = overrides.parse([word])[0]
        if value.is_sweep_override():
            raise UserError(f"{word} gives several values, and a run goes on alone, with one of them.")
        node[leaf] = value.value()
    return tree


def _place(tree: dict[str, Any], key: str) -> tuple[dict[str, Any], str]:
    """Where in the tree a setting stands. Raises UserError for one that the run does not have."""
    name = key.lstrip("+")
    *parents, leaf = name.split(".")
    node: Any = tree
    for parent in parents:
        node = node.get(parent) if isinstance(node, dict) else None
    if not isinstance(node, dict) or leaf not in node:
        raise UserError(
            f"There is no key {name} in this run's configuration, and one that goes on gets no other keys; "
            f"{CONFIG} in its folder lists them."
        )
    if name != key:
        raise UserError(f"{key} is not accepted: the key exists, write {name}=… without the +.")
    return node, leaf


def _before_and_after(tree: dict[str, Any], choices: dict[str, str], words: Sequence[str]) -> tuple[RootConfig, RootConfig]:
    """The run's own configuration, and the one with ``words`` changed."""
    changed = _changed(copy.deepcopy(tree), words)
    return build(tree, dict(choices)), build(changed, choices)


def _lengths(before: RootConfig, config: RootConfig) -> tuple[int, int]:
    """Optimizer steps before and after, or 0 and 0 where nothing was changed: the data, which say how long an epoch is, cost time."""
    if (before.trainer.steps, before.trainer.epochs) == (config.trainer.steps, config.trainer.epochs):
        return 0, 0
    return _length(before), _length(config)


def _is_over(folder: Path, chosen: Path | None) -> bool:
    """Whether the run came to its end, and ``chosen``, if one was, is the checkpoint of it."""
    if status(folder) != "FINISHED":
        return False
    return chosen is None or store.read_manifest(chosen).step >= int(read_summary(folder)["steps"])


def _length(config: RootConfig) -> int:
    return config.trainer.steps or config.trainer.total_steps(len(config.task.build().train))


def _state(folder: Path, chosen: Path | None, fall_back: bool) -> Any:
    if chosen is not None:
        return store.read(chosen)[1]
    kept = store.checkpoints(folder / store.FOLDER)
    if fall_back or not kept:
        return state_in(folder)
    return store.read(kept[-1])[1]


def state_in(folder: Path) -> Any:
    """The state in the newest checkpoint of a run that is whole, None where it has none; says what it passed over.

    Raises UserError where there are checkpoints and none is whole.
    """
    found = store.newest(folder / store.FOLDER)
    for refusal in found[2] if found else ():
        print(f"esper: {refusal}", file=sys.stderr)
    return None if found is None else found[1]


def _at_depths(output: Path, name: str) -> list[Path]:
    """Files of this name in run folders: ``<day>/<run>``, ``sweeps/<day>/<sweep>/<job>``, or the folder itself."""
    return [path for pattern in (name, f"*/{name}", f"*/*/{name}", f"*/*/*/{name}", f"*/*/*/*/{name}") for path in output.glob(pattern)]


def _log_to(folder: Path) -> None:
    """What ``conf/hydra/job_logging`` does for a run that Hydra starts: everything to the log, warnings to the terminal too."""
    folder.mkdir(parents=True, exist_ok=True)
    file, terminal = logging.FileHandler(folder / "esper.log", encoding="utf-8"), logging.StreamHandler()
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    terminal.setFormatter(Sentence())
    terminal.setLevel(logging.WARNING)
    for handler in (file, terminal):
        logging.getLogger().addHandler(handler)
    logging.getLogger().setLevel(logging.INFO)
