"""``esper --help`` and ``esper --help GROUP``, from the dataclasses and the files under ``conf/``: no heavy import."""

from __future__ import annotations

import dataclasses
import textwrap
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from esper.cli import conf
from esper.cli.launchers import LAUNCHERS
from esper.cli.programs import programs
from esper.config import GROUPS, PRESETS, RootConfig, accepted, default_options, did_you_mean, listing, options, shown
from esper.errors import UserError
from esper.search.config import SearchConfig

ABOUT = "neural networks that grow while they train, and proof of whether growing paid"

USAGE = """\
usage: esper [overrides]            train one run (same as python -m esper)
       esper --multirun [overrides] sweep: model=mlp,cnn seed=0,1,2
       esper -m hydra/sweeper=optuna [overrides]
                                    search: optimizer.lr='interval(0.001,0.1)' (--help hydra/sweeper=optuna: its keys)
       esper -m hydra/launcher=ray [overrides]
                                    sweep on a cluster (--help hydra/launcher: local, ray, submitit)
       esper PROGRAM [arguments]    another program
       esper --help GROUP           the options of a group and their keys (--help grafting=drift: of that option)
       esper OPTION                 --version; --hydra-help; --shell-completion install=bash (or zsh, fish) to eval
"""

SEARCH = "hydra/sweeper=optuna"
LAUNCHER = "hydra/launcher"

RECIPES = {
    "esper": "the default run",
    "esper check model=cnn": "look before training",
    "esper task=mnist1d seed=3 trainer.device=cpu": "another task, random seed and device",
    "esper model.width=16 lifecycle.training_min=5%": "any key of a group",
    "esper task=mnist1d model.width=32": "the host of the studies on MNIST-1D",
    "esper --multirun grafting=linear,drift seed=0,1,2": "six runs under outputs/sweeps",
    "esper --cfg job grafting=adaptive": "print the composed configuration and stop",
}


def text(words: Sequence[str] = ()) -> str:
    """The text of ``--help`` beside ``words``: everything, or one group where a word names it.

    Raises:
        UserError: an option that the group does not have.
    """
    if SEARCH in words:
        about = (SearchConfig.__doc__ or "").replace("``", "")
        return "\n".join([about, *_keys(SearchConfig, dataclasses.asdict(SearchConfig()), "hydra.sweeper")])
    for word in words:
        group, _, option = word.partition("=")
        if group == LAUNCHER:
            return _launcher(option)
        if group in GROUPS:
            return _group(group, option or default_options()[group], alone=bool(option))
    return _everything()


def _launcher(name: str) -> str:
    """The launchers of sweeps with a line each, or the keys of the one of this name."""
    if not name:
        return "\n".join(f"  {each:<12} {kind.__doc__}" for each, (_, kind) in LAUNCHERS.items())
    if name not in LAUNCHERS:
        raise UserError(f"{LAUNCHER}={name} is no launcher of esper's: choose {listing(LAUNCHERS)}{did_you_mean(name, LAUNCHERS)}")
    kind = LAUNCHERS[name][1]
    return "\n".join([str(kind.__doc__), *_keys(kind, dataclasses.asdict(kind()), "hydra.launcher")])


def _everything() -> str:
    chosen = default_options()
    lines = [f"esper: {ABOUT}", "", USAGE, "Programs:"]
    lines += [f"  {name:<12} {program.help}" for name, program in programs().items()]
    lines += ["", "Groups (* is the default; esper --help GROUP explains the keys, esper --cfg job prints every value):"]
    for group, names in conf.groups().items():
        if group not in PRESETS:
            lines += _row(group, [f"{name}*" if name == chosen.get(group) else name for name in names])
    lines += ["", "Files that set several groups at once:"]
    for preset in PRESETS:
        lines += _row(preset, conf.options(preset) or ["none yet"])
    lines += ["", "Keys of their own:"]
    helps = {field.name: field.metadata["help"] for field in dataclasses.fields(RootConfig) if field.metadata}
    for key, value in conf.root_keys().items():
        lines += _row(key, [f"{value!r} unless set; {helps[key]}"])
    lines += ["", "Recipes:", *(f"  {command:<52} {what}" for command, what in RECIPES.items())]
    return "\n".join(lines)


def _group(group: str, option: str, alone: bool) -> str:
    """The options of a group with a line each, then the keys of ``option``; the keys only, where it is asked for ``alone``."""
    names = conf.options(group)
    if option not in names:
        raise UserError(f"{group}={option} is no option of the group {group}: choose {listing(names)}{did_you_mean(option, names)}")
    kind, values = _settings(group, option)
    lines = [f"{group}={option}: {conf.description(group, option)}" if alone else f"Options of {group} (* is the default):"]
    if not alone:
        width = max(map(len, names)) + 1
        lines += [f"  {f'{name}*' if name == option else name:<{width}}  {conf.description(group, name)}" for name in names]
        lines += ["", f"Keys of {group}={option}:"]
    return "\n".join([*lines, *_keys(kind, values, group)])


def _keys(kind: type, values: Mapping[str, Any], path: str) -> list[str]:
    """The keys of a dataclass, and of those within it, with their meanings and accepted values."""
    hints, lines = typing.get_type_hints(kind), []
    for field in dataclasses.fields(kind):
        name, value = f"{path}.{field.name}", values[field.name]
        if dataclasses.is_dataclass(hints[field.name]):
            lines += _keys(hints[field.name], value, name)
        elif field.name not in ("name", "trackers"):
            lines += _key(f"{name}={shown(value)}", field.metadata, hints[field.name])
    return lines


def _key(setting: str, metadata: Mapping[str, Any], hint: Any) -> list[str]:
    about = f"{metadata.get('help') or ''} ({accepted(hint, metadata)})".strip()
    return [f"  {setting}", *textwrap.wrap(about, 110, initial_indent=" " * 6, subsequent_indent=" " * 6)]


def _settings(group: str, option: str) -> tuple[type, dict[str, Any]]:
    """The dataclass of an option, and its values."""
    if not conf.has_file(group, option):
        kind = options(group)[option]
        return kind, dataclasses.asdict(kind())
    from esper.cli import compose

    values = compose.option(group, option)
    return options(group)[values["name"]], values


def _row(name: str, words: list[str]) -> list[str]:
    return textwrap.wrap(", ".join(words), 100, initial_indent=f"  {name:<12} ", subsequent_indent=" " * 15)
