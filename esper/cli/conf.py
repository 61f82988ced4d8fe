"""The files under ``conf/``: read without Hydra, so that help is quick and spelling can be checked first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

import esper
from esper.config import GROUPS, PRESETS
from esper.errors import UserError


def folder() -> Path:
    """``conf`` inside the installed package, or beside it in a checkout."""
    package = Path(esper.__file__).resolve().parent
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent / "conf"


#: The user's own folders of options (``--config-dir``), laid out as ``conf`` is.
_own: list[Path] = []


def forget() -> None:
    """Take nothing but esper's own options in, until ``add``."""
    _own.clear()


def add(path: str) -> Path:
    """Take the options under ``path`` in; returns it as an absolute path.

    Raises:
        UserError: no such folder, or files in it for which there is no group, or that would hide one of esper's own.
    """
    found = Path(path).expanduser().resolve()
    if not found.is_dir():
        raise UserError(f"--config-dir {path}: there is no such folder; give one with groups in it, as in conf/model/mine.yaml.")
    known = (*GROUPS, *PRESETS)
    deeper = [file for group in (*known, "hydra") for file in (found / group).rglob("*.yaml")]  # elsewhere there may be runs, say
    for file in sorted({*found.glob("*/*.yaml"), *deeper}):
        group = file.parent.relative_to(found).as_posix()
        if group not in known:
            raise UserError(f"--config-dir {path}: {group}/{file.name} belongs to no group; the groups are {', '.join(known)}.")
        if (folder() / group / file.name).is_file():
            raise UserError(f"--config-dir {path}: {group}/{file.name} has the name of an option that esper has; choose another.")
    if found not in _own:
        _own.append(found)
    return found


def own() -> list[Path]:
    """The user's own folders."""
    return list(_own)


def options(group: str) -> list[str]:
    """Names of the files of a group, the user's own among them."""
    return sorted(path.stem for place in (folder(), *_own) for path in (place / group).glob("*.yaml"))


def groups() -> dict[str, list[str]]:
    """Group -> its options, in the order of the documentation; presets last."""
    found = {group: options(group) for group in (*GROUPS, *PRESETS)}
    return {group: names for group, names in found.items() if names or group in PRESETS}


def root() -> dict[str, Any]:
    """``conf/config.yaml`` as it is written."""
    return yaml.safe_load((folder() / "config.yaml").read_text(encoding="utf-8"))


def root_keys() -> dict[str, Any]:
    """The keys outside the groups, with their values."""
    return {key: value for key, value in root().items() if key not in ("defaults", "hydra")}


def defaults() -> dict[str, str]:
    """Group -> the option chosen when none is named."""
    chosen: dict[str, str] = {}
    for entry in root()["defaults"]:
        if isinstance(entry, dict):
            chosen.update({str(key).split()[-1]: str(value) for key, value in entry.items()})
    return {group: name for group, name in chosen.items() if group in GROUPS}
