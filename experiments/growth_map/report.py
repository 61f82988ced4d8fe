"""Draw the map and write the study up: gain at equal MACs over factor, time, length and kind of data.

    python experiments/growth_map/report.py <folder of the sweep> [<folder of the AdamW sweep>]

Writes map.png, frontier.png, runs.csv, findings.md and README.md beside itself, or into ``--out``.
"""

from __future__ import annotations

import argparse
import math
import shutil
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

sys.path.append(str(Path(__file__).resolve().parents[1]))
from write_up import rows_of, write_rows, write_up

EQUAL = {"half_50": "deep_75", "half_75": "deep_62", "quarter_50": "deep_62", "quarter_75": "deep_44"}
"""The final net from scratch at the MACs of each grown arm."""
NAMES = {"half_50": "2→4, at 50 %", "half_75": "2→4, at 75 %", "quarter_50": "1→4, at 50 %", "quarter_75": "1→4, at 75 %"}
Cells = dict[tuple[str, int, int], dict[str, dict[int, dict[str, Any]]]]
"""(optimizer, bytes of the training text or 0 for a stream, steps) → arm → seed → row."""


def cells(sweeps: dict[str, Path]) -> Cells:
    """The finished runs of every sweep, by cell, arm and seed. A cell's steps are those of its arm ``deep``."""
    found: Cells = defaultdict(lambda: defaultdict(dict))
    for optimizer, sweep in sweeps.items():
        rows = [row for row in rows_of(sweep) if row["kind"] == "compared" and row["status"] == "FINISHED"]
        lengths = {_steps(row) for row in rows if row["arm"] == "deep"}
        for row in rows:
            cell = min((length for length in lengths if length >= _steps(row)), default=0)
            found[(optimizer, int(row.get("task.train_tokens", 0)), cell)][row["arm"]][int(row["seed"])] = row
    return dict(sorted(found.items(), key=lambda one: (one[0][0] != "muon", one[0])))


def _steps(row: dict[str, Any]) -> int:
    return int(row["trainer.steps"])


def gains(arms: dict[str, dict[int, dict[str, Any]]], arm: str, other: str) -> np.ndarray:
    """By how much the arm's test loss is lower than the other's, a number a shared seed [nats]."""
    seeds = sorted(arms[arm].keys() & arms[other].keys())
    return np.array([arms[other][seed]["test/loss"] - arms[arm][seed]["test/loss"] for seed in seeds])


def grown(found: Cells) -> dict[str, str]:
    """The ways of growing that the sweeps have, with their names."""
    return {arm: name for arm, name in NAMES.items() if any(arms[arm] for arms in found.values())}


def called(cell: tuple[str, int, int]) -> str:
    """The cell in words."""
    optimizer, tokens, steps = cell
    text = f"{tokens / 1e6:g} MB again and again" if tokens else "fresh text"
    return f"{text}, {steps} steps" + ("" if optimizer == "muon" else ", AdamW")


def mean(values: np.ndarray) -> str:
    """Mean ± standard error, or a dash."""
    if not len(values):
        return "–"
    error = f" ± {values.std(ddof=1) / math.sqrt(len(values)):.4f}" if len(values) > 1 else ""
    return f"{values.mean():+.4f}{error} ({len(values)})"


def findings(found: Cells) -> str:
    """The map as a table, and what it says of the predictions."""
    names = grown(found)
    lines = [
        "![gain at equal MACs](map.png)",
        "",
        "![loss against MACs](frontier.png)",
        "",
        "Gain in nats a byte over the final net from scratch at equal MACs (mean ± standard error, pairs); positive: growing is better.",
        "",
        "| | " + " | ".join(names.values()) + " |",
        "|---|" + "---|" * len(names),
    ]
    for cell, arms in found.items():
        lines.append(f"| {called(cell)} | " + " | ".join(mean(gains(arms, arm, EQUAL[arm])) for arm in names) + " |")
    lines += ["", "Against the final net from scratch with all steps, and the share of its MACs:", ""]
    lines += ["| | " + " | ".join(names.values()) + " |", "|---|" + "---|" * len(names)]
    for cell, arms in found.items():
        full = np.mean([row["macs"] for row in arms["deep"].values()]) if arms["deep"] else math.nan
        parts = []
        for arm in names:
            share = np.mean([row["macs"] for row in arms[arm].values()]) / full if arms[arm] else math.nan
            parts.append(f"{mean(gains(arms, arm, 'deep'))}, {share:.0%}" if math.isfinite(share) else "–")
        lines.append(f"| {called(cell)} | " + " | ".join(parts) + " |")
    pairs = [(cell, arm, gains(arms, arm, EQUAL[arm])) for cell, arms in found.items() for arm in names]
    known = [(cell, arm, values) for cell, arm, values in pairs if len(values)]
    ahead = [f"{called(cell)}, {names[arm]} ({mean(values)})" for cell, arm, values in known if values.mean() > 0]
    told = f": {'; '.join(ahead)}" if ahead else ""
    lines += ["", f"Of {len(known)} places on the map growing is ahead at equal MACs in {len(ahead)}{told}.", ""]
    reached = [
        f"{called(cell)}, {names[arm]}"
        for cell, arms in found.items()
        for arm in ("half_75", "quarter_50", "quarter_75")
        if len(values := gains(arms, arm, "deep")) and values.mean() >= 0
    ]
    lines.append(f"A grown net has the full quality of the final net at 63 % of its MACs or less in: {'; '.join(reached) or 'none'}.")
    alone = [
        f"{called(cell)}, {names[arm]} ({mean(values)})"
        for cell, arms in found.items()
        for arm in names
        if len(values := gains(arms, arm, arm.partition("_")[0])) and values.mean() <= 0
    ]
    lines += ["", f"The small host alone, which costs less, is at least as good as the net grown from it in: {'; '.join(alone) or 'none'}."]
    return "\n".join(lines)


def draw_map(found: Cells, path: Path) -> None:
    """A row a cell of data and length, a column a way of growing: the gain at equal MACs in colour."""
    from matplotlib.figure import Figure

    names = grown(found)
    values = np.array([[np.mean(one) if len(one := gains(arms, arm, EQUAL[arm])) else np.nan for arm in names] for arms in found.values()])
    most = float(np.nanmax(np.abs(values))) if np.isfinite(values).any() else 1.0
    figure = Figure(figsize=(7.5, 1.5 + 0.6 * len(values)), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(values, cmap="RdBu", vmin=-most, vmax=most, aspect="auto")
    for row, line in enumerate(values):
        for column, value in enumerate(line):
            axes.text(column, row, f"{value:+.3f}" if math.isfinite(value) else "–", ha="center", va="center", fontsize=9)
    axes.set_xticks(range(len(names)), names.values(), fontsize=8)
    axes.set_yticks(range(len(values)), [called(cell) for cell in found])
    axes.set_title("Gain of growing at equal MACs [nats a byte]; blue: growing is better", fontsize=10)
    figure.colorbar(image, ax=axes)
    figure.savefig(path, dpi=130)


def draw_frontier(found: Cells, path: Path) -> None:
    """Test loss against training MACs, a panel a cell: the line is the final net from scratch."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.0 * len(found), 3.6), layout="constrained")
    for number, (cell, arms) in enumerate(found.items()):
        axes = figure.add_subplot(1, len(found), number + 1)
        ran = {arm: list(rows.values()) for arm, rows in arms.items() if rows}
        points = {arm: tuple(np.mean([row[key] for row in rows]) for key in ("macs", "test/loss")) for arm, rows in ran.items()}
        line = sorted(points[arm] for arm in points if arm.startswith("deep"))
        axes.plot(*zip(*line, strict=True), color="0.4", marker="o", label="from scratch") if line else None
        for arm, at in points.items():
            if not arm.startswith("deep"):
                axes.plot(*at, marker="D" if arm in NAMES else "s", linestyle="", label=NAMES.get(arm, f"{arm} alone"))
        axes.set_title(called(cell), fontsize=9)
        axes.set_xlabel("training MACs")
        axes.spines[["top", "right"]].set_visible(False)
        if not number:
            axes.set_ylabel("test loss [nats a byte]")
            axes.legend(frameon=False, fontsize=7)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", type=Path)
    parser.add_argument("adamw", type=Path, nargs="?")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    here = Path(__file__).resolve().parent
    if not (given.out / "question.md").exists():  # another study of the same nets has its own
        shutil.copy(here / "question.md", given.out)
    sweeps = {"muon": given.sweep} | ({"adamw": given.adamw} if given.adamw else {})
    found = cells(sweeps)
    if not found:
        raise SystemExit(f"No run of the comparison has finished in {given.sweep}: there is nothing to draw.")
    draw_map(found, given.out / "map.png")
    draw_frontier(found, given.out / "frontier.png")
    (given.out / "findings.md").write_text(findings(found) + "\n")
    if given.adamw:
        write_rows(rows_of(given.adamw), given.out / "runs_adamw.csv")
    write_up(given.sweep, given.out)


if __name__ == "__main__":
    main()
