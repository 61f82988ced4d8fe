"""The report of ``esper auto``: the path from the first model to the best, what was tried, why it ended, and the figure."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from esper.auto.attempts import FINISHED, Attempt
from esper.auto.config import Amount
from esper.auto.moves import LARGER, TRAIN
from esper.export.saved_model import FOLDER as MODEL

if TYPE_CHECKING:
    from rich.console import Console

TEXT, FIGURE = "auto.txt", "path.png"
WIDTH = 100
TRIED, PATH = "#999999", "#D55E00"


@dataclass(frozen=True)
class Report:
    """All attempts, and ``path``, those that were kept, from the first model to the best."""

    metric: str
    direction: str
    budget: Amount
    spent: float
    ended: str
    attempts: Sequence[Attempt]
    path: Sequence[Attempt]
    words: Sequence[str]
    test: Mapping[str, float]

    def plain(self) -> dict[str, Any]:
        """As JSON knows it; NaN is null."""

        def number(value: Any) -> Any:
            return None if isinstance(value, float) and not math.isfinite(value) else value

        attempts = [{key: number(value) for key, value in asdict(one).items()} for one in self.attempts]
        best = self.path[-1] if self.path else None
        return {
            "metric": self.metric,
            "direction": self.direction,
            "budget": asdict(self.budget),
            "spent": self.spent,
            "ended": self.ended,
            "best": None if best is None else {"attempt": best.number, "folder": best.folder},
            "path": [one.number for one in self.path],
            "test": {name: number(value) for name, value in self.test.items()},
            "words": list(self.words),
            "attempts": attempts,
        }

    def sentences(self) -> list[str]:
        """What came of it."""
        best, first = self.path[-1], self.path[0]
        unit = "MACs" if self.budget.unit != "s" else "s"
        tested = f", {self.test[self.metric]:.4g} on the test set, which was looked at once, at the end" if self.test else ""
        lines = [
            f"The best model has {best.parameters:,.0f} parameters (the first had {first.parameters:,.0f}): "
            f"{self.metric} {best.quality:.4g} on validation, the best of {sum(one.state == FINISHED for one in self.attempts)}{tested}."
        ]
        if self.metric == "accuracy":
            lines.append("Within half the standard error of the accuracy the validation loss decides.")
        tried = {one.what for one in self.attempts if one.phase == "grow"}
        for kind in sorted(tried):
            found = [one for one in self.attempts if one.phase == "grow" and one.what == kind]
            lines.append(f"{kind}: {sum(one.kept for one in found)} of {len(found)} kept.")
        lines.append(f"It ended because {self.ended}; {self.spent:.3g} of {self.budget.value:.3g} {unit} were spent.")
        return lines


def show(report: Report, folder: Path, console: Console) -> None:
    """Print the path and the sentences, and say where the model is."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=f"the path: {report.metric} on validation, {report.direction}", title_justify="left")
    for name in ("attempt", "what", report.metric, "parameters", "steps", "training MACs"):
        table.add_column(name, justify="left" if name == "what" else "right")
    for one in report.path:
        what = one.what if one.phase != "grow" else {TRAIN: "trained longer", LARGER: LARGER}.get(one.what, f"grown: {one.what}")
        numbers = [f"{one.quality:.4g}", f"{one.parameters:,.0f}", str(one.steps), f"{one.macs:.3g}"]
        table.add_row(str(one.number), escape(what), *numbers)
    console.print(table)
    for line in report.sentences():
        console.print(f"• {line}", highlight=False, markup=False, soft_wrap=True)
    command = shlex.join(["esper", "export", f"run={folder / MODEL}", f"to={folder / 'exported'}"])
    console.print(f"the model is in {folder / MODEL}; for other programs:\n  {command}", highlight=False, markup=False, soft_wrap=True)


def write_report(report: Report, folder: Path) -> None:
    """``auto.txt`` and ``path.png``."""
    from rich.console import Console

    with (folder / TEXT).open("w", encoding="utf-8") as out:
        show(report, folder, Console(file=out, width=WIDTH))
    draw(report, folder / FIGURE)


def draw(report: Report, path: Path) -> Path:
    """Size against quality, and quality against what was spent: every attempt, and the path."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.0, 4.2), layout="constrained")
    done = [one for one in report.attempts if one.state == FINISHED]
    unit = "MACs of training" if report.budget.unit != "s" else "seconds"
    panels = (("parameters", "parameters"), ("spent", f"{unit} spent"))
    for at, (name, label) in enumerate(panels):
        axes = figure.add_subplot(1, 2, at + 1)
        axes.plot([getattr(one, name) for one in done], [one.quality for one in done], "o", color=TRIED, ms=4, lw=0, label="tried")
        kept = [getattr(one, name) for one in report.path], [one.quality for one in report.path]
        axes.plot(*kept, "D-", color=PATH, ms=5, lw=1.3, label="kept", drawstyle="steps-post" if name == "spent" else "default")
        if name == "parameters":
            axes.set_xscale("log")
            for one in report.path:
                text = one.what if one.phase == "grow" else one.phase
                axes.annotate(text, (one.parameters, one.quality), xytext=(4, -10), textcoords="offset points", fontsize=7)
        axes.set_xlabel(label)
        axes.set_ylabel(f"{report.metric} on validation" if at == 0 else "")
        axes.grid(alpha=0.25, lw=0.5)
        axes.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=140, metadata={"Software": None})
    return path
