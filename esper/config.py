"""Structured configs: from a composed tree of plain values to checked dataclasses, once, at the border.

Every group's module lists the group's options in ``CONFIGS`` (option name -> dataclass); a configuration can build nothing else.
The dataclasses are the one place for defaults, units, ranges and help (``esper.setting_fields.setting``); none of them imports torch.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import importlib
import json
import math
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import esper
from esper import secrets
from esper.errors import UserError
from esper.setting_fields import setting
from esper.user_code import OPTIONS as CUSTOM

#: Group -> module with its ``CONFIGS``; a module that serves several groups keys them by group first.
GROUPS: dict[str, str] = {
    "model": "esper.hosts.config",
    "task": "esper.tasks.config",
    "sites": "esper.seeds",
    "blueprint": "esper.blueprints.config",
    "lifecycle": "esper.lifecycle",
    "grafting": "esper.grafting.config",
    "controller": "esper.controllers",
    "bus": "esper.bus",
    "tracking": "esper.tracking",
    "telemetry": "esper.seeds",
    "optimizer": "esper.trainer",
    "scheduler": "esper.trainer",
    "trainer": "esper.trainer",
    "kernel": "esper.kernels",
    "flags": "esper.feature_flags",
    "compare": "esper.compare",
}

#: Groups of files that override others (``@package _global_``); none is chosen by default.
PRESETS = ("experiment", "arm", "debug")

#: Settings on which a result does not depend: its place, its name and its trackers.
UNHASHED = ("name", "tags", "output", "resume", "tracking", "compare", *PRESETS)


@dataclass
class RootConfig:
    """A whole run. Each group holds an instance of a dataclass from its module's ``CONFIGS``."""

    seed: int = setting(0, low=0, high=2**32 - 1, help="random seed; every generator of the run derives from it")
    name: str = setting("run", help="what the run is called, in its folder's name and in the tracker")
    tags: list[str] = setting([], help="words to find the run by in the tracker")
    output: str = setting("outputs", help="folder that the runs' own folders are made in")
    resume: str = setting("", choices=("", "auto"), help="auto: go on with the run of this configuration that did not end")
    model: Any = None
    task: Any = None
    sites: Any = None
    blueprint: Any = None
    lifecycle: Any = None
    grafting: Any = None
    controller: Any = None
    bus: Any = None
    tracking: Any = None
    telemetry: Any = None
    optimizer: Any = None
    scheduler: Any = None
    trainer: Any = None
    kernel: Any = None
    flags: Any = None
    compare: Any = None
    experiment: str = setting("", help="file of conf/experiment that the run was composed with")
    arm: str = setting("", help="file of conf/arm that the run was composed with")
    debug: str = setting("", help="file of conf/debug that the run was composed with")

    def __post_init__(self) -> None:
        """Refuse names that cannot be part of a path: the run's folder is ``<output>/<date>/<time>-<name>-<letters>``."""
        if not self.name or "/" in self.name:
            raise UserError(f"name={self.name} is not accepted: it becomes part of a folder's name; give a word without /.")
        if not self.output:
            raise UserError("output is empty; give a folder, as in output=outputs.")


def options(group: str) -> dict[str, type]:
    """Option name -> dataclass of one group."""
    configs = importlib.import_module(GROUPS[group]).CONFIGS
    known = configs.get(group, configs)
    return {**known, "custom": CUSTOM[group]} if group in CUSTOM else known


def option_values(kind: type, name: str) -> dict[str, Any]:
    """The plain values of the dataclass ``kind`` that nothing overrides, as the option ``name``."""
    return {**dataclasses.asdict(kind()), "name": name}


def root_defaults() -> dict[str, Any]:
    """The keys outside the groups, with the values that nothing overrides."""
    return {key: value for key, value in dataclasses.asdict(RootConfig()).items() if key not in (*GROUPS, *PRESETS)}


def conf_folder() -> Path:
    """``conf`` inside the installed package, or beside it in a checkout."""
    package = Path(esper.__file__).resolve().parent
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent / "conf"


def conf_root() -> dict[str, Any]:
    """``conf/config.yaml`` as it is written."""
    import yaml

    tree: dict[str, Any] = yaml.safe_load((conf_folder() / "config.yaml").read_text(encoding="utf-8"))
    return tree


def default_options() -> dict[str, str]:
    """Group -> the option that ``conf/config.yaml`` chooses when none is named."""
    chosen: dict[str, str] = {}
    for entry in conf_root()["defaults"]:
        if isinstance(entry, dict):
            chosen.update({str(key).split()[-1]: str(value) for key, value in entry.items()})
    return {group: name for group, name in chosen.items() if group in GROUPS}


def build(tree: Mapping[str, Any], choices: Mapping[str, str | None] | None = None) -> RootConfig:
    """Checked dataclasses from a composed, resolved tree of plain values.

    Args:
        tree: root keys and groups, as composed.
        choices: which file of each preset group (``experiment``, ``arm``, ``debug``) was composed in.

    Raises:
        UserError: a key that does not exist, a value of another type, out of its range or no accepted word; a secret.
    """
    secrets.refuse(tree)
    settings = {key: value for key, value in tree.items() if key not in GROUPS}
    root: RootConfig = structure(RootConfig, settings, "")
    for group in GROUPS:
        if group in tree:
            setattr(root, group, build_group(group, tree[group]))
    for preset in PRESETS:
        setattr(root, preset, (choices or {}).get(preset) or "")
    return root


def build_group(group: str, values: Any) -> Any:
    """The checked settings of one group from its plain values, which have the option's name.

    Raises:
        UserError: as ``build``.
    """
    if not isinstance(values, Mapping):
        raise UserError(f"{group}={values} is no option of the group {group}; choose {listing(options(group))}.")
    if group == "tracking" and isinstance(values.get("trackers"), Mapping) and len(values["trackers"]) > 1:
        return _several_trackers(values)
    known = options(group)
    name = values.get("name")
    if name not in known:
        raise UserError(f"{group}.name={name} is not accepted: {group} is {listing(known)}{did_you_mean(name, known)}")
    return structure(known[name], values, group)


def _several_trackers(values: Mapping[str, Any]) -> Any:
    """The settings of each tracker, from those that Hydra merged into one group, or as ``plain`` wrote them."""
    from esper.tracking.config import SeveralTrackers

    known, made, used = options("tracking"), {}, {"name", "trackers"}
    if "none" in values["trackers"]:
        raise UserError("tracking=none stands alone: leave it out of the list, or leave the others out.")
    for name, own in values["trackers"].items():
        if name not in known:
            raise UserError(f"tracking.trackers has {name}, and tracking is {listing(known)}{did_you_mean(name, known)}")
        fields = {field.name for field in dataclasses.fields(known[name])}
        flat = {key: value for key, value in values.items() if key in fields}
        made[name] = structure(known[name], {**flat, "trackers": {name: {}}, **(own or {}), "name": name}, "tracking")
        used |= flat.keys()
    if unknown := [key for key in values if key not in used]:
        near = did_you_mean(unknown[0], used, "tracking.")
        raise UserError(f"There is no key tracking.{unknown[0]}: tracking=[{','.join(made)}] has {listing(sorted(used))}{near}")
    return SeveralTrackers(process=next(iter(made.values())).process, trackers=made)


def structure(kind: type, values: Mapping[str, Any], path: str) -> Any:
    """An instance of the dataclass ``kind`` from plain ``values``; ``path`` is its dotted name in the config.

    Raises:
        UserError: naming the key, the accepted values, and the nearest right spelling.
    """
    hints = typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind) if field.init}
    arguments = {}
    for key, value in values.items():
        name = f"{path}.{key}" if path else str(key)
        if key not in fields:
            near = did_you_mean(key, fields, name.removesuffix(str(key)))
            raise UserError(f"There is no key {name}: {_owner(path, values)} has {listing(fields)}{near}")
        arguments[key] = _convert(value, hints[key], fields[key].metadata, name)
    try:
        return kind(**arguments)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{path or 'The configuration'} is not accepted: {error}") from error


def _owner(path: str, values: Mapping[str, Any]) -> str:
    return f"{path}={values['name']}" if path and "name" in values else path or "the configuration"


def _convert(value: Any, hint: Any, metadata: Mapping[str, Any], name: str) -> Any:
    """``value`` as the annotated type, its range and words checked element by element."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if type(None) in inner:
        if value is None:
            return None
        hint = next(part for part in inner if part is not type(None))
        origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        return structure(hint, value, name)
    if hint == list[str] and value != "" and _scalar(value, str) is not _WRONG:
        value = [value]  # one word alone, as in sites.match=residual
    if origin in (list, tuple) and isinstance(value, (list, tuple)):
        return origin(_convert(item, inner[0], metadata, name) for item in value)
    if origin is dict and isinstance(value, Mapping):
        return {key: _convert(item, inner[1], metadata, f"{name}.{key}") for key, item in value.items()}
    converted = _scalar(value, hint)
    if converted is _WRONG or not _in_range(converted, metadata) or not _in_form(converted, metadata):
        near = did_you_mean(value, metadata.get("choices") or ())
        raise UserError(f"{name}={shown(value)} is not accepted: {name} takes {accepted(hint, metadata)}{near}")
    return converted


_WRONG = object()


def _scalar(value: Any, hint: Any) -> Any:
    if hint is Any:
        return value
    if isinstance(hint, type) and issubclass(hint, Enum):
        return hint[value] if value in hint.__members__ else _WRONG
    if hint is str and isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    return value if isinstance(hint, type) and type(value) is hint else _WRONG


def _in_range(value: Any, metadata: Mapping[str, Any]) -> bool:
    choices, low, high = (metadata.get(key) for key in ("choices", "low", "high"))
    if choices and value not in choices:
        return False
    if isinstance(value, float) and not math.isfinite(value):
        return False
    return not isinstance(value, (int, float)) or ((low is None or value >= low) and (high is None or value <= high))


DURATION = "a duration, as in 50step, 2epoch or 5% (of the run)"


def _in_form(value: Any, metadata: Mapping[str, Any]) -> bool:
    unit = metadata.get("unit") or ""
    if not unit.startswith("duration") or (not value and unit.endswith("or empty")):
        return True
    from esper.lifecycle.duration import is_duration

    return is_duration(value)


_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a finite number",
    str: "a text",
    list: "a list, as in [a,b]",
    tuple: "a list, as in [a,b]",
    dict: "keys with values, as in {a:1}",
}


def accepted(hint: Any, metadata: Mapping[str, Any]) -> str:
    """The values that a key accepts, in words: ``a whole number from 1 to 8 [ticks]``."""
    choices, low, high, unit = (metadata.get(key) for key in ("choices", "low", "high", "unit"))
    if choices:
        return listing(choices)
    if isinstance(hint, type) and issubclass(hint, Enum):
        return listing(hint.__members__)
    if unit and unit.startswith("duration"):
        return DURATION + str(unit).removeprefix("duration")
    words = "a text or a list, as in a or [a,b]" if hint == list[str] else _WORDS.get(typing.get_origin(hint) or hint, "other keys")
    if low is not None and high is not None:
        words += f" from {low} to {high}"
    elif low is not None or high is not None:
        words += f" of at least {low}" if low is not None else f" of at most {high}"
    return words + (f" [{unit}]" if unit else "")


def shown(value: Any) -> str:
    """A value as it would be typed: true, null, 0.5."""
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)


def did_you_mean(word: Any, words: Iterable[str], prefix: str = "", otherwise: str = ".") -> str:
    """The end of a sentence: ``; did you mean width?``, or ``otherwise`` when no word is near."""
    close = nearest(word, words)
    return f"; did you mean {prefix}{close}?" if close else otherwise


def nearest(word: Any, words: Iterable[str]) -> str:
    """The one of ``words`` that is spelt most like ``word``, or nothing when none is near."""
    return next(iter(difflib.get_close_matches(str(word), list(words), n=1, cutoff=0.5)), "")


def or_list(word: str) -> str:
    """The list to write instead of ``key=a,b``, before other advice: ``write key=[a,b] for all of them at once, or``.

    Nothing for a setting that takes no list.
    """
    key, _, text = word.lstrip("+").partition("=")
    group, _, field = key.partition(".")
    kinds = options(group).values() if field and group in GROUPS else ()
    takes = any(str(one.type).startswith("list[") for kind in kinds for one in dataclasses.fields(kind) if one.name == field)
    return f"write {key}=[{text}] for all of them at once, or " if (takes or key == "tracking") and "(" not in text else ""


def listing(words: Iterable[str]) -> str:
    """``a, b or c``."""
    names = [str(word) for word in words]
    return ", ".join(names[:-1]) + " or " + names[-1] if len(names) > 1 else "".join(names) or "nothing"


def plain(config: RootConfig) -> dict[str, Any]:
    """The config as nested mappings of plain values, fit for JSON and YAML."""
    return dataclasses.asdict(config, dict_factory=lambda items: {key: _plain_value(value) for key, value in items})


def _plain_value(value: Any) -> Any:
    return value.name if isinstance(value, Enum) else value


def config_hash(config: RootConfig) -> str:
    """SHA-256 over everything a result depends on: not names, folders, tags or the tracker."""
    relevant = {key: value for key, value in plain(config).items() if key not in UNHASHED}
    return hashlib.sha256(json.dumps(relevant, sort_keys=True).encode()).hexdigest()
