"""``esper compare fingerprint A B``: say whether two runs have the same bits, and if not, where they first differ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from esper.checkpoint import disk
from esper.checkpoint.tree import same
from esper.config import UNHASHED
from esper.errors import UserError
from esper.report.summary_file import NAME as SUMMARY
from esper.report.summary_file import read_summary
from esper.running.callbacks import read_checksums
from esper.running.run_folder import CONFIG, read_config
from esper.tracking.run_info import flatten
from esper.trainer.evaluation import untimed

METRICS = "metrics.parquet"
USAGE = "usage: esper compare fingerprint <run folder> <run folder>"


@dataclass(frozen=True)
class Difference:
    """Where two runs part: ``kind`` is config, data, environment, step or weights; ``text`` says it in words."""

    kind: str
    text: str


def main(arguments: Sequence[str]) -> int:
    """Print the differences that ``explain`` finds; exit code 0 for the same bits, 1 for different ones."""
    if len(arguments) != 2 or {"--help", "-h"} & set(arguments):
        print(USAGE, flush=True)
        return 0 if {"--help", "-h"} & set(arguments) else 2
    first, second = map(Path, arguments)
    differences = list(explain(first, second))
    if same_bits(first, second):
        print(f"same bits: {read_summary(first)['fingerprint']}")
        for difference in differences:
            print(f"  although the {difference.kind} differs: {difference.text}")
        return 0
    print("not the same bits")
    for difference in differences:
        print(f"  {difference.kind}: {difference.text}")
    return 1


def same_bits(first: Path, second: Path) -> bool:
    """Whether both runs ended with the same fingerprint."""
    return bool(read_summary(_run(first))["fingerprint"] == read_summary(_run(second))["fingerprint"])


def explain(first: Path, second: Path) -> Iterator[Difference]:
    """The differences of two runs, causes first: config, data, environment; then the first tick and the first weights that differ."""
    a, b = read_summary(_run(first)), read_summary(_run(second))
    yield from _values("config", _config(first), _config(second))
    if a.get("data") != b.get("data"):
        yield Difference("data", f"digest {a.get('data')} and {b.get('data')}")
    yield from _environments(_environments_of(a), _environments_of(b))
    if a["fingerprint"] != b["fingerprint"]:
        yield from _first_metric(first, second)
        yield from _first_noted(first, second)
        yield from _first_weights(first, second)


def _run(folder: Path) -> Path:
    if not (folder / SUMMARY).exists():
        raise UserError(f"{folder} has no {SUMMARY}; name the folders of two runs that ended.")
    return folder


def _config(folder: Path) -> dict[str, Any]:
    tree = read_config(folder) if (folder / CONFIG).exists() else {}
    return flatten({key: value for key, value in tree.items() if key not in UNHASHED})


def _values(kind: str, a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[Difference]:
    for key in sorted({*a, *b}):
        if a.get(key) != b.get(key):
            yield Difference(kind, f"{key} is {a.get(key)} and {b.get(key)}")


def _environments_of(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The environments of a run, each with its first step; an old summary has a single one."""
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
    for place in sorted({*a, *b}):
        if a.get(place) != b.get(place):
            tick, name = place
            yield Difference(
                "step",
                f"the first values to differ are those of {name} at tick {tick}: {a.get(place)} and {b.get(place)}",
            )
            return


def _metrics(folder: Path) -> dict[tuple[int, str], float | str]:
    """Recorded values by (tick, name), without those of a clock; NaN becomes a text, because it does not equal itself. Raises UserError."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = folder / METRICS
    if not path.exists():
        raise UserError(f"{folder} has no {METRICS}")
    try:
        table = pq.read_table(path, columns=["tick", "name", "value"]).to_pydict()
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path} cannot be read ({' '.join(str(error).split())})") from error
    rows = untimed(zip(table["tick"], table["name"], table["value"], strict=True))
    return {(tick, name): value if value == value else "NaN" for tick, name, value in rows}


def _first_noted(first: Path, second: Path) -> Iterator[Difference]:
    """The first look at the validation set whose recorded weights differ."""
    a, b = read_checksums(first), read_checksums(second)
    common = sorted(a.keys() & b.keys())
    apart = next((place for place, step in enumerate(common) if a[step] != b[step]), None)
    if apart is not None:
        before = f"at step {common[apart - 1]} they were equal" if apart else "none was noted before by both"
        yield Difference("weights", f"the first noted to differ are those after step {common[apart]}; {before}")


def _first_weights(first: Path, second: Path) -> Iterator[Difference]:
    """The first checkpoint that both have and that differs, with the first tensor in it that does."""
    common = {path.name for path in disk.checkpoints(first / disk.FOLDER)} & {p.name for p in disk.checkpoints(second / disk.FOLDER)}
    if not common:
        yield Difference("weights", "no step is left of which both have a checkpoint; trainer.checkpoint_keep keeps more of them")
    before = "there is no earlier checkpoint that both have"
    for name in sorted(common):
        a, b = (disk.read(folder / disk.FOLDER / name)[1]["trainer"] for folder in (first, second))
        for part in ("host", "buffers", "optimizer", "grow"):
            if (part != "grow" and not same(a[part], b[part])) or (part == "grow" and not same(a[part]["garden"], b[part]["garden"])):
                where = next((f" ({key})" for key in a[part] if not same(a[part][key], b[part].get(key))), "") if part == "host" else ""
                yield Difference("weights", f"at step {int(name)} the {part} differs{where}; {before}")
                return
        before = f"at step {int(name)} all were equal"
