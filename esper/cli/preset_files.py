"""The keys that an experiment, arm or debug file sets, and overrides that would contradict an arm's file."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from esper.errors import UserError

_HEADER = re.compile(r"^#\s*@package\s+(\S+)", re.MULTILINE)


def refuse_overridden_arm(typed: Sequence[str], arm: str, folders: Sequence[Path]) -> None:
    """Refuse an override of a key that an arm's file sets: Hydra would silently let the override win.

    The option of a group may be chosen if the arm sets only some of its keys, which then take precedence.

    Args:
        typed: groups and dotted keys set on the command line.
        arm: name of the arm's file, ``<folder>/<arm>.yaml`` in one of ``folders``.

    Raises:
        UserError: naming the key and the arm.
    """
    ours = keys_set_by(arm, folders)
    for key in typed:
        for name, file in ours.items():
            if key == name or key.startswith(f"{name}.") or ("." in key and name.startswith(f"{key}.")):
                raise UserError(
                    f"{key} is set on the command line and by arm {arm!r} (conf/arm/{file}.yaml sets {name}); the "
                    f"command line would win in every arm: leave {key} out, or sweep over it instead of arm."
                )


def keys_set_by(preset: str, folders: Sequence[Path]) -> dict[str, str]:
    """The dotted keys and groups that a preset sets, each with the file that sets it: its own, or one from its defaults."""
    found: dict[str, str] = {}
    files = [preset]
    for file in files:  # grows on the way
        for path in (path for folder in folders if (path := folder / f"{file}.yaml").exists()):
            text = path.read_text(encoding="utf-8")
            tree = yaml.safe_load(text) or {}
            for name in keys_in(tree, _package(text)):
                found.setdefault(name, file)
            files += [other for other in _taken_in(tree) if other not in files]
    return found


def _package(text: str) -> str:
    """The package in a file's header ``# @package``, below which its keys lie; empty for the top."""
    header = _HEADER.search(text)
    return header[1] if header and header[1] != "_global_" else ""


def _taken_in(tree: dict[str, Any]) -> list[str]:
    """The files that this one includes by ``defaults: [base]``."""
    entries = [entry for entry in tree.get("defaults", []) if isinstance(entry, str) and entry != "_self_"]
    return [entry.split()[-1].removeprefix("/arm/").partition("@")[0] for entry in entries]


def keys_in(tree: dict[str, Any], package: str = "") -> list[str]:
    """The dotted keys and groups that a file sets; its keys lie below ``package``."""
    groups = []
    for entry in tree.get("defaults", []):
        if isinstance(entry, dict):
            groups += [str(key).split()[-1].lstrip("/").partition("@")[0] for key in entry]
    prefix = f"{package}." if package else ""
    return groups + _leaves({key: value for key, value in tree.items() if key not in ("defaults", "hydra")}, prefix)


def _leaves(tree: dict[str, Any], prefix: str = "") -> list[str]:
    found = []
    for key, value in tree.items():
        name = f"{prefix}{key}"
        found += _leaves(value, f"{name}.") if isinstance(value, dict) and value else [name]
    return found
