"""The description of a run that a tracker gets before the first message, and the run's readable name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec


class DatasetInfo(msgspec.Struct, frozen=True, kw_only=True):
    """The data a run learns from; ``digest`` is a SHA-256 in hexadecimal, ``sizes`` examples by split."""

    name: str
    digest: str
    description: str = ""
    sizes: dict[str, int] = {}


class RunInfo(msgspec.Struct, frozen=True, kw_only=True):
    """Identity and circumstances of one run.

    ``folder`` is the run's own folder and ``outputs`` the root of all runs, both absolute. ``started_ms`` (milliseconds
    since 1970) anchors every timestamp: a value of tick t is stamped ``started_ms + t``, so a repeated message stores
    it once. ``changed`` holds the settings that differ from the defaults, flattened, and ``chosen`` each run's parts (model, task, …).
    ``parent`` is the MLflow run of a sweep.
    ``primary`` names the metric that decides, ``direction`` is ``max`` or ``min``.
    """

    run: str
    name: str
    folder: str
    outputs: str
    started_ms: int
    config: dict[str, Any] = {}
    changed: dict[str, str] = {}
    chosen: dict[str, str] = {}
    tags: dict[str, str] = {}
    dataset: DatasetInfo | None = None
    parent: str = ""
    primary: str = ""
    direction: str = "max"


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, keys joined by dots; lists stay values."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{name}."))
        else:
            flat[name] = value
    return flat


def differences(config: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, str]:
    """Flattened entries of ``config`` that ``defaults`` lacks or holds otherwise, as text."""
    base = flatten(defaults)
    absent = object()
    return {key: str(value) for key, value in flatten(config).items() if base.get(key, absent) != value}


NAME_LENGTH = 100  # characters of a run's name; MLflow's table shows its beginning
UNNAMED = ("seed", "name", "output", "tags", "arm", "resume", "bus.", "tracking.", "compare.", "model.name", "task.name")
"""Settings that a name does not repeat: it has them in its own place, or they do not change the training."""


def readable_name(what: str, changed: Mapping[str, str], seed: int, arm: str = "") -> str:
    """A name that a person can read in a list of runs and tell from the others, like ``mlp-digits controller=none seed=0``.

    The name starts with ``what``, then the arm or, without one, the settings that differ from the defaults: groups first, others by name,
    as many as fit. The seed comes last, as in the names of a sweep's runs.
    """
    named = {key.removesuffix(".name") for key in changed if key.endswith(".name")}

    def rank(key: str) -> tuple[int, str]:
        group, _, rest = key.removesuffix(".name").partition(".")
        return (0 if not rest else 2 if group in named else 1), key  # an option that is named stands for its settings

    keys = sorted((key for key in changed if not key.startswith(UNNAMED) and not key.endswith(".target")), key=rank)
    told = [f"{key.removesuffix('.name')}={changed[key]}" for key in keys]
    end = f"seed={seed}"
    parts = [what]
    for part in [arm] if arm else told:
        if len(" ".join([*parts, part, "…", end])) > NAME_LENGTH:
            parts.append("…")
            break
        parts.append(part)
    return " ".join([*parts, end])
