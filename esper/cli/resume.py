"""``resume=`` and ``fork=`` on the command line: continue a run with the same bits or, as a new run, with other settings.

``resume=<run folder>`` (or one of its checkpoints) takes the config stored there; ``resume=auto`` looks under ``output`` for
the unfinished run of exactly this configuration; ``fork=<run folder>`` starts a new run from that state.
"""

from __future__ import annotations

import copy
import logging
import secrets
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from esper.checkpoint.tree import fitting
from esper.cli import conf, overrides
from esper.cli.compose import option
from esper.cli.terminal import Sentence
from esper.config import GROUPS, RootConfig, build, listing, or_list
from esper.errors import UserError
from esper.running.resume import Start, fork_state, is_over, locate, saved_config, saved_state, total_steps, unfinished
from esper.running.run_folder import CONFIG, refuse_running

#: Settings that a resumed run may change: none of them changes a bit of the training so far.
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


def main(words: Sequence[str]) -> int:
    """``esper resume=<folder> [overrides]`` or ``esper fork=<folder> [overrides]``; returns the exit code."""
    key = "resume" if any(word.startswith("resume=") and word != "resume=auto" for word in words) else "fork"
    place = Path(next(word for word in words if word.startswith(f"{key}=")).partition("=")[2])
    others = [word for word in words if not word.startswith(f"{key}=")]
    return go_on(fork(place, others) if key == "fork" else resume(place, others))


def go_on(start: Start) -> int:
    """Continue training from there; returns the exit code."""
    from esper.running.run import run

    _log_to(start.folder)
    run(start.config, start.folder, state=start.state)
    return 0


def resume(place: Path, words: Sequence[str] = (), fall_back: bool = False) -> Start:
    """The run to continue in ``place`` (its folder, or one of its checkpoints).

    With ``fall_back`` damaged checkpoints are skipped; else they are refused.
    Raises UserError for a run that is finished or running, and for an override that would change the bits.
    """
    folder, chosen = locate(place)
    refuse_running(folder)
    tree, choices = saved_config(folder)
    refuse_changes(words, folder)
    before, config = _before_and_after(tree, choices, words)
    was, now = _lengths(before, config)
    if now < was:
        raise UserError(
            f"This ends the run at step {now}, and {folder} was to train {was}: with resume= a run only gets longer. To train less "
            f"from its state, in a new run: fork={folder} {' '.join(words)}."
        )
    if now == was and is_over(folder, chosen):
        key = "steps" if before.trainer.steps else "epochs"
        raise UserError(
            f"The run in {folder} is finished; to train it longer give trainer.{key}=<more than {getattr(before.trainer, key)}>, "
            f"to try other settings from its end fork={folder}."
        )
    return Start(config, folder, saved_state(folder, chosen, fall_back))


def fork(place: Path, words: Sequence[str] = ()) -> Start:
    """A new run, in its own folder, that begins with the state in ``place`` and with its settings changed by ``words``.

    An optimizer or a controller of another kind starts over, with a message on stderr. Raises UserError if there is no state, if it
    does not fit, or if nothing is left to train.
    """
    folder, chosen = locate(place)
    before, config = _before_and_after(*saved_config(folder), words)
    if config.controller.process == "external":
        raise UserError(
            f"A fork has a folder of its own, in which a controller in another process would go on without its memory: resume={folder}"
            " goes on with both; only a run with controller.process=internal can be forked."
        )
    state = saved_state(folder, chosen, fall_back=False)
    if state is None:
        raise UserError(f"There is no checkpoint in {folder} to fork from; name a run that saved one.")
    state, said = fork_state(state, before, config)
    with fitting():
        done, total = int(state["trainer"]["steps"]), total_steps(config)
    if total <= done:
        raise UserError(
            f"The state in {chosen or folder} is that of step {done}, and the fork would end at step {total}, with nothing left to train; "
            f"give trainer.steps=<more than {done}>."
        )
    for sentence in said:
        print(f"esper: {sentence}", file=sys.stderr)
    now = time.strftime("%Y-%m-%d/%H-%M-%S")
    return Start(config, Path(config.output) / f"{now}-{config.name}-{secrets.token_hex(3)}", state)


def auto(config: RootConfig, folder: Path) -> Start | None:
    """The run that ``resume=auto`` continues, or None; the folder of a new run of this config would be ``folder``."""
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
        _changed(saved_config(folder)[0], [word])  # a mistake that no fork takes either is refused for itself
        raise UserError(
            f"{word} would change what this run computes; with resume= only {listing([*CHANGEABLE, *WHOLE_GROUPS])} may change. "
            f"To start a new run from its state with other settings: fork={folder} {word}."
        )


def _matches(key: str, pattern: str) -> bool:
    return key.startswith(pattern[:-1]) if pattern.endswith("*") else key == pattern


def _changed(tree: dict[str, Any], words: Sequence[str]) -> dict[str, Any]:
    """``tree`` with each ``key=value`` or ``group=option`` applied; ``build`` checks the result."""
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or word.startswith(("-", "~")):
            raise UserError(
                f"'{word}' is no setting, and a run goes on alone: write key=value, as in trainer.steps=4000; a sweep goes on by its own "
                "words with resume=auto."
            )
        value = overrides.parse([word])[0]
        if value.is_sweep_override():
            raise UserError(f"{word} gives {key} several values, and a run goes on alone: {or_list(word)}give one.")
        if key in GROUPS:
            if key == "tracking" and text.startswith("["):
                overrides.check_group(value)
            elif text not in conf.options(key):
                raise UserError(f"{key}={text} is no option of the group {key}: choose {listing(conf.options(key))}.")
            tree[key] = option(key, text)
            continue
        node, leaf = _place(tree, key)
        node[leaf] = value.value()
    return tree


def _place(tree: dict[str, Any], key: str) -> tuple[dict[str, Any], str]:
    """The mapping and key of a setting in the tree. Raises UserError for one that the run does not have."""
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
    """Optimizer steps before and after; 0 and 0 if nothing was changed, to save reading the data for the length of an epoch."""
    if (before.trainer.steps, before.trainer.epochs) == (config.trainer.steps, config.trainer.epochs):
        return 0, 0
    return total_steps(before), total_steps(config)


def _log_to(folder: Path) -> None:
    """Log as ``conf/hydra/job_logging`` does for a run that Hydra starts: everything to the file, warnings to the terminal too."""
    folder.mkdir(parents=True, exist_ok=True)
    file, terminal = logging.FileHandler(folder / "esper.log", encoding="utf-8"), logging.StreamHandler()
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    terminal.setFormatter(Sentence())
    terminal.setLevel(logging.WARNING)
    for handler in (file, terminal):
        logging.getLogger().addHandler(handler)
    logging.getLogger().setLevel(logging.INFO)
