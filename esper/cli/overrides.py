"""Checks of the typed overrides, one by one, so that every mistake gets a sentence instead of Hydra's traceback."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import OverrideParseException

from esper.cli import conf
from esper.config import PRESETS, did_you_mean, listing, or_list, shown
from esper.errors import UserError
from esper.user_code import OPTIONS as CUSTOM

#: Where a user's own part takes its arguments.
_ARGUMENT = re.compile(rf"({'|'.join(CUSTOM)})\.args\.\w")

#: A setting that itself holds keys, of which no file knows: ``compare.tune={optimizer.lr:[0.001,0.003]}``.
_KEYS = re.compile(r"(?!hydra\.)\w+(\.\w+)+=\{")


def parse(words: Sequence[str]) -> list[Override]:
    """Overrides from the command line's words.

    Raises:
        UserError: a word that is no override.
    """
    return [_parse_one(word) for word in quoted(words)]


def quoted(words: Sequence[str]) -> list[str]:
    """The words in the form that Hydra requires.

    Option names that its grammar would read as numbers are quoted (``debug=nan``), and keys that stand in no file are marked as new:
    arguments of the user's own parts (``model.args.width=64``), and values in braces (``compare.fresh_seeds={again:1000}``).
    """
    return [_quote(word) for word in words]


def _quote(word: str) -> str:
    group, _, text = word.partition("=")
    if _ARGUMENT.match(group) or _KEYS.match(word):
        return f"++{word}"
    names = text.split(",")
    if "nan" not in names or group not in conf.groups():
        return word
    return f"{group}=" + ",".join(f"'{name}'" if name == "nan" else name for name in names)


def _parse_one(word: str) -> Override:
    if "=" not in word and not word.startswith("~"):
        known = [f"{key}=…" for key in (*conf.groups(), *conf.root_keys())]
        raise UserError(f"'{word}' is no setting: write key=value, as in seed=1{did_you_mean(word, known)}")
    try:
        return OverridesParser.create().parse_overrides([word])[0]
    except OverrideParseException as error:
        hint = "put quotes around special characters, as in 'name=\"a b\"'"
        raise UserError(f"'{word}' cannot be read as key=value: {_first_line(error)}; {hint}.") from error


def key_of(override: Override) -> str:
    """The dotted key or group, without Hydra's prefixes."""
    return str(override.key_or_group)


def is_hydras(override: Override) -> bool:
    """Whether the override sets Hydra itself, which checks it."""
    return key_of(override).split(".")[0].split("/")[0] == "hydra"


def is_group(override: Override) -> bool:
    return key_of(override) in conf.groups()


def check_group(override: Override) -> None:
    """Refuses an option that the group does not have.

    Raises:
        UserError: naming the group's options and the nearest.
    """
    group, names = key_of(override), conf.options(key_of(override))
    if override.is_add() or override.is_delete():
        raise UserError(f"{_typed(override)} is not accepted: choose with {group}={_example(names)}, without + or ~.")
    values: list[Any] = list(override.sweep_string_iterator()) if override.is_sweep_override() else [override.value()]
    if group == "tracking" and isinstance(values[0], list):
        values = check_several(values[0])
    for value in values:
        if value is None and group in PRESETS:
            continue
        if not isinstance(value, str) or value not in names:
            near = did_you_mean(value, names)
            raise UserError(f"{group}={shown(value)} is no option of the group {group}: choose {listing(names)}{near}")


def check_several(names: list[Any]) -> list[Any]:
    """The names in ``tracking=[mlflow,csv]``.

    Raises:
        UserError: none, one twice, or a file of the user's, whose settings need not say which tracker they are for.
    """
    if not names or len(set(map(str, names))) < len(names):
        raise UserError("tracking=[…] takes different trackers, as in tracking=[mlflow,csv]; for none write tracking=none.")
    if own := [name for name in names if len(names) > 1 and conf.is_own("tracking", str(name))]:
        raise UserError(f"tracking=[…] takes esper's own options, and {own[0]} is a file: let it name the others in its defaults.")
    return names


def check_key(override: Override, tree: Mapping[str, Any]) -> None:
    """Refuses a key that the composed ``tree`` does not have.

    Raises:
        UserError: naming the nearest key.
    """
    key = key_of(override)
    parts = key.split(".")
    node: Any = tree
    for depth, part in enumerate(parts):
        if not isinstance(node, Mapping) or part not in node:
            free = depth >= 2 and isinstance(node, Mapping)  # a setting that itself holds keys: esper.config checks it
            if free and (override.is_add() or override.is_force_add()):
                return
            raise UserError(_unknown(key, parts[:depth], node, tree))
        node = node[part]
    if override.is_delete():
        raise UserError(f"~{key} is not accepted: every setting has a value; leave it out to keep the default.")
    if override.is_add() and not override.is_force_add():
        raise UserError(f"+{key} is not accepted: the key exists, write {key}=… without the +.")


def check_single(overrides: Sequence[Override]) -> None:
    """Refuses a sweep where one run was asked for.

    Raises:
        UserError: naming the first override with several values.
    """
    for override in overrides:
        if override.is_sweep_override():
            word, key = _typed(override), key_of(override)
            raise UserError(f"{word} gives {key} several values: {or_list(word)}add --multirun to sweep over them.")


def check_discrete(overrides: Sequence[Override]) -> None:
    """Refuses an interval in a sweep that runs every value.

    Raises:
        UserError: naming the first override with an interval.
    """
    for override in overrides:
        if override.is_interval_sweep():
            raise UserError(f"{_typed(override)} is an interval, and a sweep runs every value: add hydra/sweeper=optuna to search in it.")


def _unknown(key: str, path: Sequence[str], node: Any, tree: Mapping[str, Any]) -> str:
    """The sentence about an unknown key."""
    leaf = key.split(".")[-1]
    everywhere = _dotted(tree)
    if not path:
        known = [*conf.groups(), *conf.root_keys()]
        same_leaf = [name for name in everywhere if name.split(".")[-1] == leaf]
        hint = f"; did you mean {listing(same_leaf[:3])}?" if same_leaf else did_you_mean(key, [*known, *everywhere])
        return f"There is no key {key}: the first word of a setting is {listing(known)}{hint}"
    owner = ".".join(path)
    if not isinstance(node, Mapping):
        return f"There is no key {key}: {owner} is a single value."
    chosen = f"{owner}={node['name']}" if "name" in node else owner
    near = did_you_mean(leaf, list(node), f"{owner}.", "") or did_you_mean(key, everywhere)
    return f"There is no key {key}: {chosen} has {listing(node)}{near}"


def _dotted(tree: Mapping[str, Any], path: str = "") -> list[str]:
    names: list[str] = []
    for key, value in tree.items():
        names.append(f"{path}{key}")
        if isinstance(value, Mapping):
            names.extend(_dotted(value, f"{path}{key}."))
    return names


def _example(names: Sequence[str]) -> str:
    return names[0] if names else "name"


def _typed(override: Override) -> str:
    return str(override.input_line)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0].rstrip(".")
