"""Every setting of every option, in Markdown, from the dataclasses that check them: the same that ``esper --help GROUP`` reads."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from esper.cli import conf
from esper.cli.launchers import LAUNCHERS
from esper.config import GROUPS, PRESETS, RootConfig, accepted, default_options, option_values, options, shown
from esper.search.config import SearchConfig

MARK = "<!-- generated from the dataclasses -->"


def text() -> str:
    """The whole reference."""
    lines = ["## Keys of their own", *_table(RootConfig, {field: _default(field) for field in _own(RootConfig)}, "")]
    for group in GROUPS:
        lines += ["", f"## {group}"]
        for name in conf.options(group):
            usual = " (the default)" if name == default_options().get(group) else ""
            lines += ["", f"### {group}={name}", "", f"{_plain(conf.description(group, name))}{usual}", ""]
            if name in options(group):
                kind = options(group)[name]
                lines += _table(kind, option_values(kind, name), group)
    for title, kind, path in (
        *((f"hydra/launcher={name}", kind, "hydra.launcher") for name, (_, kind) in LAUNCHERS.items()),
        ("hydra/sweeper=optuna", SearchConfig, "hydra.sweeper"),
    ):
        lines += ["", f"## {title}", "", _plain((kind.__doc__ or "").partition("\n")[0]), ""]
        lines += _table(kind, dataclasses.asdict(kind()), path)
    for preset in PRESETS:
        lines += ["", f"## {preset}", "", "| file | |", "|---|---|"]
        lines += [f"| `{preset}={name}` | {_cell(conf.description(preset, name))} |" for name in conf.options(preset)]
    return "\n".join(lines) + "\n"


def _own(kind: type) -> list[str]:
    return [field.name for field in dataclasses.fields(kind) if field.metadata]


def _default(name: str) -> Any:
    return dataclasses.asdict(RootConfig())[name]


def _table(kind: type, values: Mapping[str, Any], path: str) -> list[str]:
    rows = list(_rows(kind, values, path))
    return ["", "| key | default | meaning | accepts |", "|---|---|---|---|", *rows] if rows else ["It has no keys."]


def _rows(kind: type, values: Mapping[str, Any], path: str) -> Iterator[str]:
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        if field.name not in values or (path and field.name in ("name", "trackers")):
            continue
        name = f"{path}.{field.name}" if path else field.name
        if dataclasses.is_dataclass(hints[field.name]):
            yield from _rows(hints[field.name], values[field.name], name)
        else:
            default = shown(values[field.name])
            meaning = _cell(field.metadata.get("help") or "")
            yield f"| `{name}` | {_code(default)} | {meaning} | {_cell(accepted(hints[field.name], field.metadata))} |"


def _code(words: str) -> str:
    return f"`{words}`".replace("|", "\\|") if words else "empty"


def _cell(words: str) -> str:
    return _plain(words).replace("|", "\\|")


def _plain(words: str) -> str:
    """Text of the program as Markdown: what Markdown would read as a sign is written as itself."""
    for sign in "*_<[":
        words = words.replace(sign, f"\\{sign}")
    return words
