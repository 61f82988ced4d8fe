"""The options of the groups: esper's dataclasses, the files under ``conf/`` that override them, and the user's own files.

All of it is read without Hydra, so that help is quick and spelling can be checked first. ``register`` gives Hydra the options
that exist as dataclasses only.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from esper import config
from esper.cli.launchers import LAUNCHERS
from esper.config import GROUPS, PRESETS
from esper.errors import UserError
from esper.search.config import SearchConfig

#: The user's own folders of options (``--config-dir``), laid out as ``conf`` is.
_own: list[Path] = []


def forget() -> None:
    """Forget all options but esper's own."""
    _own.clear()


def add(path: str) -> Path:
    """Add the options under ``path``, which is returned as an absolute path.

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
        if file.stem in _esper_options(group):
            raise UserError(f"--config-dir {path}: {group}/{file.name} has the name of an option that esper has; choose another.")
    if found not in _own:
        _own.append(found)
    return found


def own() -> list[Path]:
    """The user's own folders."""
    return list(_own)


def options(group: str) -> list[str]:
    """Names of the options of a group, the user's own among them."""
    return sorted(_esper_options(group) | {path.stem for place in _own for path in (place / group).glob("*.yaml")})


def _esper_options(group: str) -> set[str]:
    files = {path.stem for path in (config.conf_folder() / group).glob("*.yaml")}
    return files | set(config.options(group)) if group in GROUPS else files


def has_file(group: str, name: str) -> bool:
    """Whether a file makes the option; other options are a dataclass and nothing else."""
    return any((place / group / f"{name}.yaml").is_file() for place in (config.conf_folder(), *_own))


def is_own(group: str, name: str) -> bool:
    """Whether the option is a file of the user's."""
    return any((place / group / f"{name}.yaml").is_file() for place in _own)


def description(group: str, name: str) -> str:
    """The description of an option in one line: from its dataclass, or the first comment of its file."""
    for place in (config.conf_folder(), *_own):
        path = place / group / f"{name}.yaml"
        if path.is_file():
            comments = [line[1:].strip() for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
            return next((line for line in comments if not line.startswith("@package")), "")
    return (config.options(group)[name].__doc__ or "").partition("\n")[0].replace("``", "")


def register() -> None:
    """Give Hydra the options that are dataclasses and not files, the keys of the root, esper's launchers and its search."""
    from hydra.core.config_store import ConfigStore

    store = ConfigStore.instance()
    for group in GROUPS:
        for name, kind in config.options(group).items():
            if not (config.conf_folder() / group / f"{name}.yaml").is_file():
                store.store(group=group, name=name, node=config.option_values(kind, name), provider="esper")
    store.store(name="root", node=config.root_defaults(), provider="esper")
    for name, (target, launcher) in LAUNCHERS.items():
        keys = {key: value for key, value in config.option_values(launcher, name).items() if key != "name"}
        store.store(group="hydra/launcher", name=name, node={"_target_": target, **keys}, provider="esper")
    optuna = {"_target_": "hydra_plugins.esper_workers.OptunaSweeper", **dataclasses.asdict(SearchConfig()), "params": {}}
    store.store(group="hydra/sweeper", name="optuna", node=optuna, provider="esper")


def register_for_sweeps() -> None:
    """Move options of single runs to ``<group>/single``: those of ``conf/sweep`` take their names and build on them.

    Hydra warns of a file that has the name of an option in its store. ``register`` puts the options back for later compositions.
    """
    from hydra.core.config_store import ConfigStore

    store = ConfigStore.instance()
    for path in sorted((config.conf_folder() / "sweep").glob("*/*.yaml")):
        group, name = path.parent.name, path.stem
        store.repo[group].pop(path.name, None)
        node = config.option_values(config.options(group)[name], name)
        store.store(group=f"{group}/single", name=name, node=node, provider="esper")


def groups() -> dict[str, list[str]]:
    """Group -> its options, in the order of the documentation; presets last."""
    found = {group: options(group) for group in (*GROUPS, *PRESETS)}
    return {group: names for group, names in found.items() if names or group in PRESETS}


def root_keys() -> dict[str, Any]:
    """The keys outside the groups, with their values."""
    return config.root_defaults() | {key: value for key, value in config.conf_root().items() if key not in ("defaults", "hydra")}
