"""``summary.json``: one run in numbers, read by the end-of-run report, comparisons and people who open the folder."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

from esper.errors import UserError

NAME = "summary.json"
ROOM = 1 << 16
"""Bytes kept free for it: some eighty branches."""


class BranchSummary(TypedDict, total=False):
    """One branch: ``seed`` is −1 for a block, ``path`` lists [stage name, tick].

    ``gain`` is loss off − loss on, ``gain_bound`` its lower confidence bound; None where it was never judged. ``replaces`` is the branch
    in whose place it was to be, else −1; its gain is that over the other. ``ranks`` are those that it adds to its layer at the end of the
    run (``blueprint=lora``).
    """

    site: str
    seed: int
    branch: int
    generation: int
    blueprint: str
    strategy: str
    path: list[list[Any]]
    gain: float | None
    gain_bound: float | None
    parameters: int
    replaces: int
    ranks: int


class GateSummary(TypedDict, total=False):
    """A gate over the whole run: how often asked and passed, and the value that came closest to its threshold."""

    closest: float | None
    threshold: float | None
    asked: int
    passed: int


class MetricsSummary(TypedDict):
    """Values by name: ``test/…`` and ``validation/…`` at the end, and the best validation values."""

    final: dict[str, float]
    best: dict[str, float]


class SeedsSummary(TypedDict):
    """How often a seed entered these stages."""

    germinated: int
    fossilized: int
    culled: int
    cancelled: int
    rolled_back: int


class ParametersSummary(TypedDict):
    """Parameters of the host before, and of host and kept branches after."""

    before: int
    after: int


class SecondsSummary(TypedDict, total=False):
    """Wall time of the step loop, and of it on shadow forwards and on judging."""

    total: float
    shadow: float
    judge: float


class CompilerSummary(TypedDict):
    """Graphs that torch's compiler made in the run's last process, and the seconds it took."""

    graphs: int
    seconds: float


class ControlSummary(TypedDict, total=False):
    """Metrics of the host alone, by the names in ``metrics.final``; None where no control was run."""

    same_steps: dict[str, float] | None
    same_macs: dict[str, float] | None


class KeptSummary(TypedDict):
    """Which host the run's model is, where it is not the one that grew, and why in one sentence."""

    host: str
    why: str


class GrownSummary(TypedDict):
    """The grown host's own entries, where the never-grown one took its place."""

    metrics: MetricsSummary
    branches: list[BranchSummary]
    parameters: ParametersSummary
    fingerprint: str


class Summary(TypedDict, total=False):
    """Everything in ``summary.json``. MACs count training alone; ``fingerprint`` knows no clock; ``bus`` counts messages of this process.

    ``environment`` is that of the run's last session, ``environments`` those of all of them, each ``since`` a step.
    ``kept`` and ``grown`` are there only where ``trainer.keep=better`` kept the never-grown host, ``trace``, the path of a file, where
    ``trainer.profile`` asked for one.
    """

    run: str
    name: str
    status: str
    primary: str
    direction: str
    ticks: int
    steps: int
    metrics: MetricsSummary
    seeds: SeedsSummary
    branches: list[BranchSummary]
    gates: dict[str, GateSummary]
    refusals: dict[str, int]
    parameters: ParametersSummary
    macs: int
    macs_by_pass: dict[str, int]
    seconds: SecondsSummary
    compiler: CompilerSummary
    stages: dict[str, int]
    control: ControlSummary
    control_curves: dict[str, dict[str, list[list[float]]]]
    kept: KeptSummary
    grown: GrownSummary
    environment: dict[str, Any]
    environments: list[dict[str, Any]]
    fingerprint: str
    alerts: list[dict[str, Any]]
    bus: dict[str, int]
    output: str
    trace: str
    config_hash: str
    data: str
    seed: int


def reserve(folder: str | Path) -> None:
    """Take now the room that ``write_summary`` will need: a disk that fills up while the run lasts leaves it its summary.

    Raises OSError where there is no room even now.
    """
    _unfinished(folder).write_bytes(bytes(ROOM))


def _unfinished(folder: str | Path) -> Path:
    return (Path(folder) / NAME).with_suffix(".tmp")


def write_summary(summary: Mapping[str, Any], folder: str | Path) -> Path:
    """Write ``summary.json`` into ``folder`` in one move, keys sorted, NaN and infinities as null; its path."""
    path = Path(folder) / NAME
    text = json.dumps(plain(summary), indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
    temporary = _unfinished(folder)
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT, 0o666), "wb") as file:  # over the reserved room
        file.write(text.encode())
        file.truncate()
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    return path


def read_summary(folder: str | Path) -> dict[str, Any]:
    """Inverse of ``write_summary``; raises FileNotFoundError when the run left none, UserError for one that is damaged."""
    path = Path(folder) / NAME
    way_out = "restore it, or delete it so that its run counts as one that did not end"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} cannot be read ({error}); {way_out}.") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} holds no summary; {way_out}.")
    return found


def plain(value: Any) -> Any:
    """``value`` as JSON knows it: text keys, lists, and None for numbers that are not finite.

    Raises TypeError for a value that is neither a mapping, a sequence, a number, text, a path nor None.
    """
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        items = sorted(value) if isinstance(value, set | frozenset) else value
        return [plain(item) for item in items]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "item"):  # NumPy and torch scalars
        return plain(value.item())
    raise TypeError(f"{type(value).__name__} has no place in a summary: {value!r}")
