"""The study's README and figure, from results.csv."""

from __future__ import annotations

import csv
import json
import platform
from pathlib import Path
from typing import Any

import numpy as np

WANTED_SHARE, WANTED_RECOVERY = 0.8, 0.9
Rows = list[dict[str, Any]]
_TEXT = ("phase", "arm")


def read(path: Path) -> Rows:
    """The runs, numbers as numbers."""
    with path.open(newline="") as file:
        return [{key: value if key in _TEXT else float(value) for key, value in row.items()} for row in csv.DictReader(file)]


def machine(folder: Path, options: str, cost: str) -> None:
    """Keep beside the results how, where and in what time they were measured."""
    import torch

    place = f"{cost}; Python {platform.python_version()}, torch {torch.__version__}, {platform.machine()}, one thread a run"
    (folder / "machine.json").write_text(json.dumps({"options": options, "measured": place}) + "\n")


def summed_up(rows: Rows, arms: list[str]) -> dict[str, dict[str, float]]:
    """Of every arm the shares at the crippled layer, its error, and the share of the gap recovered (mean, and by seed the spread).

    The gap is a ratio of means over the seeds: on a seed where crippling hardly hurts, a ratio of its own would say nothing.
    """
    study = [row for row in rows if row["phase"] == "study"]
    error = {(row["arm"], row["seed"]): row["error"] for row in study}
    found: dict[str, dict[str, float]] = {}
    for arm in arms:
        mine = [row for row in study if row["arm"] == arm]
        if not mine:
            continue
        gaps = np.array([error["host", row["seed"]] - error["healthy", row["seed"]] for row in mine])
        wins = np.array([error["host", row["seed"]] - row["error"] for row in mine])
        total = {name: sum(row[name] for row in mine) for name in ("germinated", "there", "kept", "kept_there")}
        draws = np.random.default_rng(0).integers(0, len(mine), (2000, len(mine)))
        spread = np.quantile(wins[draws].sum(1) / gaps[draws].sum(1), (0.025, 0.975))
        found[arm] = total | {
            "error": float(np.mean([row["error"] for row in mine])),
            "share": total["there"] / total["germinated"] if total["germinated"] else float("nan"),
            "kept_share": total["kept_there"] / total["kept"] if total["kept"] else float("nan"),
            "recovered": float(wins.sum() / gaps.sum()),
            "low": float(spread[0]),
            "high": float(spread[1]),
            "runs": len(mine),
        }
    return found


def verdict(one: dict[str, float]) -> str:
    """What an arm reached of what was wanted."""
    reached = (one["share"] >= WANTED_SHARE, one["recovered"] >= WANTED_RECOVERY)
    return {(True, True): "both", (True, False): "share alone", (False, True): "recovery alone", (False, False): "neither"}[reached]


def table(found: dict[str, dict[str, float]]) -> list[str]:
    """The README's table."""
    lines = [
        "| arm | test error | germinated there | kept there | gap recovered (95 %) | reached |",
        "|---|---|---|---|---|---|",
    ]
    for arm, one in found.items():
        if arm in ("healthy", "host"):
            lines.append(f"| `{arm}` | {one['error']:.4f} | – | – | {'100' if arm == 'healthy' else '0'} % | – |")
            continue
        there = f"{one['there']:.0f} of {one['germinated']:.0f} ({_percent(one['share'])})"
        kept = f"{one['kept_there']:.0f} of {one['kept']:.0f} ({_percent(one['kept_share'])})"
        gap = f"{_percent(one['recovered'])} ({_percent(one['low'])} to {_percent(one['high'])})"
        lines.append(f"| `{arm}` | {one['error']:.4f} | {there} | {kept} | {gap} | {verdict(one)} |")
    return lines


def _percent(value: float) -> str:
    return "–" if np.isnan(value) else f"{100 * value:.0f} %"


def figure(found: dict[str, dict[str, float]], layers: int, path: Path) -> None:
    """Of every growing arm the share of germinations at the crippled layer and of the gap recovered."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    arms = [arm for arm in found if arm not in ("healthy", "host")]
    places = np.arange(len(arms))
    drawn, axes = pyplot.subplots(figsize=(8.0, 3.6), layout="constrained")
    axes.bar(places - 0.2, [100 * found[arm]["share"] for arm in arms], 0.38, label="germinations at the crippled layer", color="#4c72b0")
    recovered = [100 * max(0.0, found[arm]["recovered"]) for arm in arms]
    axes.bar(places + 0.2, recovered, 0.38, label="gap to the healthy host recovered", color="#dd8452")
    axes.axhline(100 / layers, color="black", linewidth=0.8, linestyle=":")
    axes.text(len(arms) - 0.5, 100 / layers + 1, "chance", ha="right", fontsize=8)
    axes.set_xticks(places, arms, rotation=15)
    axes.set_ylabel("%")
    axes.set_ylim(0, 119)
    axes.legend(loc="upper right", fontsize=8, ncols=2, frameon=False)
    drawn.savefig(path, dpi=110)
    pyplot.close(drawn)


def write_up(rows: Rows, folder: Path, layers: int, events: int, arms: list[str]) -> str:
    """Write README.md and the figure into ``folder``; returns the text."""
    found = summed_up(rows, arms)
    figure(found, layers, folder / "found.png")
    said = json.loads((folder / "machine.json").read_text())
    pilots, lessons = (sum(row["phase"] == phase for row in rows) for phase in ("pilot", "lesson"))
    runs = int(max(one["runs"] for one in found.values()))
    good = [f"`{arm}`" for arm, one in found.items() if arm not in ("healthy", "host") and verdict(one) == "both"]
    share, recovery = f"{100 * WANTED_SHARE:.0f} %", f"{100 * WANTED_RECOVERY:.0f} %"
    lines = [
        "# Do controllers find the one layer that needs growth?",
        "",
        f"**Question.** A host has {layers} layers side by side, each of which reads a part of the input of its own, and the target is a",
        "sum of functions of these parts. In one layer all but 4 of 32 units are silent for good, so only a branch there can help. Does",
        "a controller grow there, and does the host then do what a healthy one does?",
        "",
        f"**Wanted, stated beforehand.** At least {share} of germinations at the crippled layer, against {100 / layers:.0f} % by chance,",
        f"and at least {recovery} of the healthy host's gap in test error recovered. Every arm may grow {events} branches. {runs}",
        "seeds; each draws the data and the weights, and has the next layer crippled. `wiser_bandit` begins with what",
        f"{pilots} pilots on other data have learnt, one after the other, with another layer crippled in each.",
        *([f"`by_policy` was learnt from {lessons} further pilots, which grew at random places or by health."] if lessons else []),
        "",
        f"**Command.** `python experiments/crippled_layer/run.py {said['options']}` ({said['measured']}).",
        "Every run is in `results.csv`. `--again` writes this page from it.",
        "",
        *table(found),
        "",
        "![germinations at the crippled layer, and the gap recovered](found.png)",
        "",
        f"**Verdict.** Both are reached by {', '.join(good) if good else 'no arm'}.",
        "",
        "A probe tries candidates at every layer by its design, so of its germinations the kept ones are what it has found.",
        "",
    ]
    text = "\n".join(lines)
    (folder / "README.md").write_text(text)
    return text
