"""What the studies with loops of their own share: many short runs over processes within a time limit, tuning, tables between marks."""

from __future__ import annotations

import csv
import json
import multiprocessing
import os
import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch

Row = dict[str, Any]
TUNING_SEED = 1000
"""Seeds of tuning runs begin here, so that no run that is judged has one of them."""


class TimeLimit:
    """``minutes`` from now; 0 means none."""

    def __init__(self, minutes: float) -> None:
        self.end = time.monotonic() + 60.0 * minutes if minutes else float("inf")

    def left(self) -> float:
        """Seconds left."""
        return self.end - time.monotonic()


def job(arm: str, block: str, seed: int, settings: Mapping[str, Any], **more: Any) -> Row:
    """A run to be carried out."""
    return {"arm": arm, "block": block, "seed": seed, "settings": dict(settings), **more}


def carry_out(one: Callable[[Row], Row], jobs: Iterable[Row], path: Path, workers: int, limit: TimeLimit) -> list[Row]:
    """The rows of the jobs, in order of the jobs, each written to ``path`` as soon as it is there.

    No job is begun that would end after the limit, as far as the earlier ones of its arm and block tell. A job that raises ends the study.
    """
    waiting, under_way, found, longest = list(jobs), dict[Future[Row], int](), dict[int, Row](), dict[str, float]()
    count, total = 0, len(waiting)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    with path.open("w", newline="", encoding="utf-8") as file, _pool(workers) as pool:
        writer: csv.DictWriter[str] | None = None
        while waiting or under_way:
            while waiting and len(under_way) < workers:
                given, number = waiting.pop(0), count
                count += 1
                if longest.get(_kind(given), 0.0) < limit.left():
                    under_way[pool.submit(_timed, one, given)] = number
            if not under_way:
                break
            for future in wait(under_way, return_when=FIRST_COMPLETED).done:
                row = found[under_way.pop(future)] = future.result()
                longest[_kind(row)] = max(longest.get(_kind(row), 0.0), row["seconds"])
                if writer is None:
                    writer = csv.DictWriter(file, list(row), lineterminator="\n")
                    writer.writeheader()
                writer.writerow({name: _written(value) for name, value in row.items()})
                file.flush()
    print(f"{path.name}: {len(found)} of {total} runs", flush=True)
    return [found[number] for number in sorted(found)]


def _pool(workers: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("fork"))


def _kind(row: Row) -> str:
    return f"{row['arm']} {row['block']}"


def _timed(one: Callable[[Row], Row], given: Row) -> Row:
    torch.set_num_threads(1)
    begun = time.perf_counter()
    measured = one(given)
    known = {name: given[name] for name in ("arm", "block", "seed", "settings")}
    return {**known, **measured, "seconds": time.perf_counter() - begun}


def _written(value: Any) -> Any:
    if isinstance(value, dict):
        return json.dumps(value, sort_keys=True)
    return f"{value:.5g}" if isinstance(value, float) else value


def read(path: Path) -> list[Row]:
    """What ``carry_out`` wrote."""
    with path.open(newline="", encoding="utf-8") as file:
        return [{name: _read(name, value) for name, value in row.items()} for row in csv.DictReader(file)]


def _read(name: str, value: str) -> Any:
    if name in ("arm", "block"):
        return value
    if name == "settings":
        return json.loads(value)
    return int(value) if name == "seed" else float(value)


def tuning_jobs(grids: Mapping[str, Sequence[Mapping[str, Any]]], blocks: Sequence[str], seeds: int, **more: Any) -> list[Row]:
    """Every arm with every one of its settings; seed by seed, so that what there was time for can be compared."""
    return [
        job(arm, block, TUNING_SEED + seed, settings, **more)
        for seed in range(seeds)
        for block in blocks
        for arm, grid in grids.items()
        for settings in grid
    ]


def best(rows: Sequence[Row], metric: str) -> dict[tuple[str, str], Row]:
    """The settings with the largest mean of ``metric``, by arm and block; the first of equal ones."""
    values: dict[tuple[str, str], dict[str, list[float]]] = {}
    for row in rows:
        settings = json.dumps(row["settings"], sort_keys=True)
        values.setdefault((row["arm"], row["block"]), {}).setdefault(settings, []).append(row[metric])
    means = {place: {settings: sum(found) / len(found) for settings, found in by.items()} for place, by in values.items()}
    return {place: json.loads(max(by, key=lambda settings: by[settings])) for place, by in means.items()}


def note_machine(folder: Path, workers: int) -> None:
    """``machine.json``: where the runs were made."""
    folder.mkdir(parents=True, exist_ok=True)
    found = {"python": platform.python_version(), "torch": torch.__version__, "processor": platform.machine(), "cores": os.cpu_count()}
    (folder / "machine.json").write_text(json.dumps(found | {"workers": workers}, indent=2) + "\n", encoding="utf-8")


def cost_line(folder: Path) -> str:
    """One sentence: how many runs were made, in how many hours of a core, where."""
    rows = [row for name in ("tuning.csv", "runs.csv") if (folder / name).exists() for row in read(folder / name)]
    hours, path = sum(row["seconds"] for row in rows) / 3600.0, folder / "machine.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    where = f", on {known['workers']} of {known['cores']} cores ({known['processor']}), torch {known['torch']}" if known else ""
    return f"{len(rows)} runs, those of the tuning included, in {hours:.1f} core hours{where}; no GPU."


def in_words(verdict: str) -> str:
    """The verdict on an arm against its reference: better, worse, equivalent or inconclusive."""
    return {"B better": "better", "A better": "worse"}.get(verdict, verdict)


def between_marks(path: Path, mark: str, text: str) -> None:
    """Put ``text`` into the file between ``<!-- mark -->`` and the next ``<!-- end -->``."""
    before, found, rest = path.read_text(encoding="utf-8").partition(f"<!-- {mark} -->\n")
    if not found:
        raise ValueError(f"{path} has no mark <!-- {mark} -->")
    _, end, after = rest.partition("<!-- end -->")
    path.write_text(f"{before}{found}{text.strip()}\n{end}{after}", encoding="utf-8")


def mean(values: Iterable[float]) -> float:
    """The arithmetic mean."""
    known = list(values)
    return sum(known) / len(known) if known else float("nan")
