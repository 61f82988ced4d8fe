"""What a tracker is told about a run before its first message."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec


class DatasetRecord(msgspec.Struct, frozen=True, kw_only=True):
    """The data a run learns from; ``digest`` is a SHA-256 in hexadecimal, ``sizes`` examples by split."""

    name: str
    digest: str
    description: str = ""
    sizes: dict[str, int] = {}


class RunRecord(msgspec.Struct, frozen=True, kw_only=True):
    """Identity and circumstances of one run.

    ``folder`` is the run's own folder and ``outputs`` the root of all runs, both absolute. ``started_ms`` (milliseconds
    since 1970) anchors every timestamp: a value of tick t is stamped ``started_ms + t``, so that saying it twice says
    it once. ``changed`` holds what differs from the defaults, flattened. ``parent`` is the MLflow run of a sweep.
    ``primary`` names the metric that decides, ``direction`` is ``max`` or ``min``.
    """

    run: str
    name: str
    folder: str
    outputs: str
    started_ms: int
    config: dict[str, Any] = {}
    changed: dict[str, str] = {}
    tags: dict[str, str] = {}
    dataset: DatasetRecord | None = None
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


def readable_name(model: str, task: str, strategy: str, seed: int, arm: str = "") -> str:
    """A name that a person can read in a list of runs, like ``digits-mlp seed=0 linear``; MLflow's table shows its beginning."""
    return " ".join(part for part in (f"{task}-{model}", f"seed={seed}", arm or strategy) if part)
