"""Whether two runs have the same bits, and if not, where they first differ. A run that has not ended is compared as far as it came."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from esper.config import UNHASHED
from esper.errors import UserError
from esper.report.summary_file import NAME as SUMMARY
from esper.report.summary_file import read_summary
from esper.running.run_folder import CONFIG, read_config
from esper.tracking.recorded_tables import read_recorded
from esper.tracking.run_info import flatten

if TYPE_CHECKING:
    import pyarrow as pa

METRICS = "metrics.parquet"


@dataclass(frozen=True)
class Difference:
    """Where two runs part: ``kind`` is config, data, environment, step or weights; ``text`` says it in words."""

    kind: str
    text: str


def same_bits(first: Path, second: Path) -> bool:
    """Whether both runs ended, and with the same fingerprint."""
    a, b = (_summary(folder).get("fingerprint") for folder in (first, second))
    return a is not None and a == b


def explain(first: Path, second: Path) -> Iterator[Difference]:
    """The differences of two runs, causes first: config, data, environment; then the first tick and the first weights that differ."""
    a, b = _summary(first), _summary(second)
    yield from _values("config", _config(first), _config(second))
    if a and b and a.get("data") != b.get("data"):
        yield Difference("data", f"digest {a.get('data')} and {b.get('data')}")
    yield from _environments(_environments_of(first, a), _environments_of(second, b))
    if not same_bits(first, second):
        yield from _first_metric(first, second)
        yield from _first_telemetry(first, second)
        yield from _first_noted(first, second)
        yield from _first_weights(first, second)


def _summary(folder: Path) -> dict[str, Any]:
    """The summary of a run, empty for one that has not ended."""
    if (folder / SUMMARY).exists():
        return read_summary(folder)
    if not (folder / CONFIG).exists():
        raise UserError(f"{folder} is no run's folder: it has neither {SUMMARY} nor {CONFIG}.")
    return {}


def _config(folder: Path) -> dict[str, Any]:
    tree = read_config(folder) if (folder / CONFIG).exists() else {}
    return flatten({key: value for key, value in tree.items() if key not in UNHASHED})


def _values(kind: str, a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[Difference]:
    for key in sorted({*a, *b}):
        if a.get(key) != b.get(key):
            yield Difference(kind, f"{key} is {a.get(key)} and {b.get(key)}")


def _environments_of(folder: Path, summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The environments of a run, each with its first step; an old summary has a single one."""
    if not summary:
        from esper.running.provenance import sessions

        return [dict(session) for session in sessions(folder)] or [{"since": 0, "environment": None}]
    return summary.get("environments") or [{"since": 0, "environment": summary["environment"]}]


def _environments(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> Iterator[Difference]:
    """Differences of the environments, for every step from which one of the runs had another one; each is reported once."""
    said: set[str] = set()
    for step in sorted({life["since"] for life in (*a, *b)}):
        here, there = (_at(step, lives) for lives in (a, b))
        where = f" from step {step} on" if step else ""
        if here is None or there is None:
            found = [Difference("environment", "what computed one of the runs, or both, was not recorded")]
        else:
            found = list(_values("environment", flatten(here), flatten(there)))
        for one in found:
            if one.text not in said:
                yield Difference("environment", f"{one.text}{where}")
        said = {one.text for one in found}


def _at(step: int, lives: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The environment that computed the steps after ``step``; before its first environment a fork has that one."""
    found: dict[str, Any] | None = [life for life in lives if life["since"] <= step or life is lives[0]][-1]["environment"]
    return found


def _first_metric(first: Path, second: Path) -> Iterator[Difference]:
    """The first tick at which a recorded value differs; values of a clock are left out."""
    try:
        a, b = _metrics(first), _metrics(second)
    except UserError as error:
        yield Difference("step", f"the first values to differ cannot be told: {error}")
        return
    end = _common_end((first, max(a)[0] if a else -1), (second, max(b)[0] if b else -1))
    for place in sorted(place for place in {*a, *b} if place[0] <= end):
        if a.get(place) != b.get(place):
            tick, name = place
            yield Difference(
                "step",
                f"the first values to differ are those of {name} at tick {tick}: {a.get(place)} and {b.get(place)}",
            )
            return


def _common_end(*runs: tuple[Path, int]) -> int:
    """The last tick up to which runs can be compared, given the last of each: of one that has not ended, that tick may not be whole yet.

    Two runs that ended are compared to the end of the longer, so that one that stopped early differs there.
    """
    under_way = [tick - 1 for folder, tick in runs if not (folder / SUMMARY).exists()]
    return min(under_way, default=max(tick for _, tick in runs))


def _metrics(folder: Path) -> dict[tuple[int, str], float | str]:
    """Recorded values by (tick, name), without those of a clock; NaN becomes a text, because it does not equal itself. Raises UserError."""
    from esper.trainer.evaluation import untimed

    if (folder / SUMMARY).exists() and not (folder / METRICS).exists():
        raise UserError(f"{folder} has no {METRICS}")
    table = read_recorded(folder, "metrics", ["tick", "name", "value"]).to_pydict()
    rows = untimed(zip(table["tick"], table["name"], table["value"], strict=True))
    return {(tick, name): value if value == value else "NaN" for tick, name, value in rows}


def _first_telemetry(first: Path, second: Path) -> Iterator[Difference]:
    """The first tick, site and seed at which a column of the telemetry differs, of the ticks that both have recorded."""
    import numpy as np
    import pyarrow.compute as pc

    try:
        a, b = read_recorded(first, "seeds"), read_recorded(second, "seeds")
    except UserError as error:
        yield Difference("telemetry", f"the first row to differ cannot be told: {error}")
        return
    last = _common_end(*((folder, pc.max(rows["tick"]).as_py() if len(rows) else -1) for folder, rows in ((first, a), (second, b))))
    a, b = (_in_order(table.filter(pc.field("tick") <= last)) for table in (a, b))
    rows = min(len(a), len(b))
    apart, column = rows, ""
    for name in (name for name in a.column_names if name in b.column_names):
        here, there = (table[name][:rows].to_numpy(zero_copy_only=False) for table in (a, b))
        same = (here == there) | ((here != here) & (there != there))  # NaN stands for NaN
        if not same.all() and (at := int(np.argmin(same))) < apart:
            apart, column = at, name
    if column:
        tick, site, seed = (a[name][apart].as_py() for name in ("tick", "site", "seed"))
        here, there = (table[column][apart].as_py() for table in (a, b))
        yield Difference("telemetry", f"the first row to differ is seed {seed} at {site}, tick {tick}: {column} is {here} and {there}")
    elif len(a) != len(b):
        yield Difference("telemetry", f"{len(a)} and {len(b)} rows up to tick {last}: the runs did not record the same ticks or seeds")


def _in_order(table: pa.Table) -> pa.Table:
    """Rows by tick, site and seed; the order in which sites were recorded is that of a clock."""
    import pyarrow as pa

    plain = table.set_column(table.column_names.index("site"), "site", table["site"].cast(pa.string()))
    named = plain.set_column(plain.column_names.index("stage_name"), "stage_name", plain["stage_name"].cast(pa.string()))
    return named.sort_by([("tick", "ascending"), ("site", "ascending"), ("seed", "ascending")])


def _first_noted(first: Path, second: Path) -> Iterator[Difference]:
    """The first look at the validation set whose recorded weights differ."""
    from esper.running.callbacks import read_checksums

    a, b = read_checksums(first), read_checksums(second)
    common = sorted(a.keys() & b.keys())
    apart = next((place for place, step in enumerate(common) if a[step] != b[step]), None)
    if apart is not None:
        before = f"at step {common[apart - 1]} they were equal" if apart else "none was noted before by both"
        yield Difference("weights", f"the first noted to differ are those after step {common[apart]}; {before}")


def _first_weights(first: Path, second: Path) -> Iterator[Difference]:
    """The first checkpoint that both have and that differs, with the first tensor in it that does."""
    from esper.checkpoint import disk
    from esper.checkpoint.shards import put_in
    from esper.checkpoint.tree import same

    common = {path.name for path in disk.checkpoints(first / disk.FOLDER)} & {p.name for p in disk.checkpoints(second / disk.FOLDER)}
    if not common:
        yield Difference("weights", "no step is left of which both have a checkpoint; trainer.checkpoint_keep keeps more of them")
    before = "there is no earlier checkpoint that both have"
    for name in sorted(common):
        a, b = (put_in(disk.read(folder / disk.FOLDER / name)[1]["trainer"]) for folder in (first, second))
        for part in ("host", "buffers", "optimizer", "grow"):
            if (part != "grow" and not same(a[part], b[part])) or (part == "grow" and not same(a[part]["garden"], b[part]["garden"])):
                where = next((f" ({key})" for key in a[part] if not same(a[part][key], b[part].get(key))), "") if part == "host" else ""
                yield Difference("weights", f"at step {int(name)} the {part} differs{where}; {before}")
                return
        before = f"at step {int(name)} all were equal"
