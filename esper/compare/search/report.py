"""The report of a search: what was tried, the best trial or the front, in the terminal, in files and for the store."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from esper.compare.results.report import fit_width
from esper.compare.results.tables import number
from esper.compare.search.result import SearchResult
from esper.compare.search.trials import DONE, FAILED, MACS, PARAMETERS, PRUNED
from esper.search.config import COSTS, QUALITY
from esper.search.space import shown
from esper.tracking.mlflow_run import LONGEST_TAG, NOTE_TAG, fitted, legal

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

SHOWN = 10  # trials in the terminal's table
WIDTH = 100


def show(result: SearchResult, console: Console) -> None:
    """Print the best trials and the sentences."""
    if result.finished:
        console.print(fit_width(_table(result), console.width))
    for line in result.sentences():
        console.print(f"• {line}", highlight=False, markup=False, soft_wrap=True)
    if result.finished:
        console.print(f"To train the best again:\n  {result.command(result.finished[0])}", highlight=False, markup=False, soft_wrap=True)


def _table(result: SearchResult) -> Table:
    from rich.table import Table

    table = Table(title=f"the best trials by {result.goal.metric} on validation, {result.goal.direction}", title_justify="left")
    for name in ("trial", "settings", result.goal.metric, "test", PARAMETERS, "training MACs"):
        table.add_column(name, justify="left" if name == "settings" else "right", overflow="fold")
    chosen = result.finished[:SHOWN]
    if len(result.goal.objectives) > 1:
        chosen = [one for one in result.finished if one.number in result.front or one in chosen]
    for one in chosen:
        mark = "*" if one.number in result.front else ""
        counted = "–" if math.isnan(one.parameters) else f"{one.parameters:,.0f}"
        cells = [number(one.quality), number(one.test), counted, number(one.macs)]
        table.add_row(f"{mark}{one.number}", escape(shown(one.values)), *cells)
    return table


def write_results(result: SearchResult, folder: Path, figures: bool) -> list[Path]:
    """``search.json``, ``search.txt``, ``trials.csv`` and the figures in ``folder``."""
    from rich.console import Console

    files = [folder / "search.json", folder / "search.txt", folder / "trials.csv"]
    files[0].write_text(json.dumps(_plain(result), indent=2) + "\n", encoding="utf-8")
    with files[1].open("w", encoding="utf-8") as out:
        show(result, Console(file=out, width=WIDTH))
    with files[2].open("w", encoding="utf-8", newline="") as out:
        _write_csv(result, csv.writer(out))
    if figures and result.trials:
        from esper.compare.search.figures import draw

        files += draw(result, folder / "figures")
    return files


def _plain(result: SearchResult) -> dict[str, Any]:
    trials = [{key: _number(value) for key, value in asdict(one).items()} for one in result.trials]
    best = result.finished[0] if result.finished else None
    return {
        **asdict(result.goal),
        "sampler": result.sampler,
        "best": None if best is None else {"trial": best.number, "values": best.values, "command": result.command(best)},
        "front": list(result.front),
        "importances": result.importances,
        "sentences": result.sentences(),
        "trials": trials,
    }


def _number(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write_csv(result: SearchResult, out: Any) -> None:
    keys = [key.lstrip("+") for key in result.trials[0].values] if result.trials else []
    out.writerow(["trial", "state", *keys, QUALITY, "test", *COSTS])
    for one in result.trials:
        numbers = ["" if math.isnan(value) else repr(value) for value in (one.quality, one.test, one.parameters, one.macs)]
        out.writerow([one.number, one.state, *one.values.values(), *numbers])


def store_metrics(result: SearchResult) -> dict[str, float]:
    """The best trial's numbers and the counts, as metrics of the search's own run."""
    found = {f"trials/{state}": float(sum(one.state == state for one in result.trials)) for state in (DONE, PRUNED, FAILED)}
    if result.finished:
        best = result.finished[0]
        numbers = {result.goal.metric: best.quality, f"test_{result.goal.metric}": best.test, PARAMETERS: best.parameters, MACS: best.macs}
        found |= {f"best/{name}": value for name, value in numbers.items()} | {"best/trial": float(best.number)}
    return {legal(name): value for name, value in found.items() if math.isfinite(value)}


def store_tags(result: SearchResult) -> dict[str, str]:
    """The sentences as the description, and the best settings."""
    tags = {NOTE_TAG: fitted("\n\n".join(result.sentences()), LONGEST_TAG)}
    return tags | ({"best": fitted(shown(result.finished[0].values), LONGEST_TAG)} if result.finished else {})
