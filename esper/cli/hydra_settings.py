"""The settings of Hydra that a configuration may change: folders, the way a sweep runs, logging; none that leads to code.

Hydra imports the classes that its callbacks, loggers, launchers and sweepers name, imports the packages of its search path, and sets
environment variables. Only the keys below are accepted; any other ``hydra.…`` in a word or a file is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import hydra
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from esper import secrets
from esper.cli import conf, overrides
from esper.cli.launchers import LAUNCHERS, is_local, keys_of
from esper.config import listing
from esper.errors import UserError
from esper.user_code import VARIABLE, allowed

KEYS = ("hydra.run.dir", "hydra.sweep.dir", "hydra.sweep.subdir", "hydra.mode", "hydra.verbose")
GROUPS = ("hydra.launcher", "hydra.sweeper")

#: Keys that the composition itself writes.
_COMPOSED = ("hydra.runtime", "hydra.overrides", "hydra.job.override_dirname")

#: The launchers and sweepers that take data alone.
_OURS = (
    *(target for target, _ in LAUNCHERS.values()),
    "hydra_plugins.esper_workers.BasicSweeper",
    "hydra_plugins.esper_workers.OptunaSweeper",
    "hydra._internal.core_plugins.basic_launcher.BasicLauncher",
    "hydra._internal.core_plugins.basic_sweeper.BasicSweeper",
)


def check_words(words: Sequence[Override]) -> None:
    """Refuse, before anything is composed, a word that sets a forbidden key of Hydra.

    Raises:
        UserError: naming the key, and those that are accepted.
    """
    for word in words:
        if word.package is not None:
            raise UserError(f"{word.input_line} is not accepted: a group's file has one place, so leave out @{word.package}.")
        if overrides.is_hydras(word):
            _check(overrides.key_of(word).replace("/", "."))


def check_tree(composed: DictConfig) -> None:
    """Refuse a composed node ``hydra`` in which a file has set a forbidden key, or that names a class that is not allowed.

    Raises:
        UserError: naming the key; for a class, the package to allow.
    """
    secrets.refuse(OmegaConf.to_container(composed, resolve=False), "hydra")
    for group in GROUPS:
        node = composed.get(group.partition(".")[2])
        _check_classes(group, dict(_flat(OmegaConf.to_container(node, resolve=True) if OmegaConf.is_dict(node) else node, group)))
    if not conf.own():
        return  # esper's own files, and words that were checked
    base = hydra.compose("config", [], return_hydra_config=True)
    before, now = (dict(_flat(OmegaConf.to_container(node, resolve=False), "hydra")) for node in (base.hydra, composed))
    for key in sorted(set(now) | set(before)):
        if now.get(key) != before.get(key) and not _under(key, _COMPOSED):
            _check(key)


def _check_classes(group: str, settings: Mapping[str, Any]) -> None:
    """Interpolations are resolved in ``settings``: one could stand for a mapping with a class in it."""
    if f"{group}._target_" not in settings:
        kind = group.partition(".")[2]
        raise UserError(f"{group} is not accepted: it says how a sweep runs, by a file of its own, as in hydra/{kind}=basic.")
    for key, value in settings.items():
        if key.rpartition(".")[2] != "_target_" or value in _OURS:
            continue
        if not allowed().imports(str(value).rpartition(".")[0]):
            package = str(value).partition(".")[0]
            raise UserError(f"{key}={value} would run code of '{package}', which nobody allowed: set {VARIABLE}={package}.")


def runs_here(composed: DictConfig) -> bool:
    """Whether the launcher is one that runs its jobs on this machine; others may send them elsewhere."""
    target = composed.launcher["_target_"]
    return target in _OURS and (keys_of(target) is None or is_local(target))


def _check(key: str) -> None:
    if key in KEYS or _under(key, GROUPS):
        return
    raise UserError(
        f"{key} is not accepted: of Hydra's own settings esper takes {listing([*KEYS, *(f'{group}.…' for group in GROUPS)])}, "
        "since others run code, set the environment or write elsewhere."
    )


def _under(key: str, tops: Sequence[str]) -> bool:
    return any(key == top or key.startswith(f"{top}.") for top in tops)


def _flat(tree: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Dotted keys with their values; lists are gone through as well, since a class may be named in one."""
    entries = tree.items() if isinstance(tree, Mapping) else enumerate(tree) if isinstance(tree, list) else ()
    if not entries:
        yield path, tree
    for key, value in entries:
        yield from _flat(value, f"{path}.{key}")
