"""Dataclass fields that carry range, unit and help, so that config checks and ``--help`` read them from one place."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any


def setting(
    default: Any,
    *,
    low: float | None = None,
    high: float | None = None,
    unit: str = "",
    help: str = "",
    choices: Sequence[str] | None = None,
) -> Any:
    """A dataclass field with its inclusive range, unit, accepted words and one line of help in the metadata.

    Mutable defaults (lists, dicts) are copied for every instance.
    """
    metadata = {"low": low, "high": high, "unit": unit, "help": help, "choices": tuple(choices) if choices else None}
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: copy.deepcopy(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)
