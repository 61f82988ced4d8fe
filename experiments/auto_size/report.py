"""README.md and the figure of the study from results.csv: `python experiments/auto_size/report.py [folder]`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).parent))

from data_sets import FROM

POINTS = 100.0
ALLOWED, SHARE = 0.5, 0.5
RUNS = 30  # of a grid

TEXT = """# Does `esper auto` find a good size by itself?

**Question.** Is the model that [`esper auto`](../../docs/auto.md) finds within {allowed} point of the best of a grid of static sizes on
the test set, with fewer parameters on average, for at most half of the grid's MACs? And how does it compare with a tuned gradient
boosting on tables?

**Data.** {count} data sets that ship with packages:

{data}

Accuracies and explained variances are given in points (100 × the value). Every pair is another division of the data with another
random seed ({pairs} of them, {complete} data sets with all of them); all methods of a pair have the same rows.

**The grid.** Five sizes (perceptrons with two hidden layers of 16 … 256 units on tables; convolution nets with 4-8 … 32-64 channels on
series and images), three learning rates, and two lengths: as long as the longest attempt of auto, and a quarter of it. That makes 30
runs a pair. The *oracle* is the size with the best mean on the **test** set, with rate and length chosen on validation in each pair. It
is chosen among five by what it is measured by, so it looks a little better than it is. The *grid's choice* is the run that validation
would choose.

**auto** may spend half of the MACs of its pair's grid, begins with the smallest size of the grid, and sees the test set once. *Spent*
is what it had spent when it ended. **Boosting** is scikit-learn's `HistGradientBoosting` on the rows as esper prepares them, its five
settings by Optuna in {trials} trials on the rows that choose in auto and in the grid too (validation and judging). With the best
settings it is then fitted to these rows and the training rows together, as one would do it: it learns from 85 % of the rows of a table,
auto and the grid from 55 %.

## Against the grid

{grid}

Differences are of auto to the oracle with a 95 % t-interval over pairs. Of {count} data sets auto is within {allowed} point of the
oracle on {within}, by the mean; the oracle's sizes differ from data set to data set, and auto's cannot be seen beforehand. Over data
sets the mean difference is {mean:+.2f} points to the oracle (median {median:+.2f}), and {choice:+.2f} to the grid's choice. Its models
have {ratio:.2f} times the parameters of the oracle's (geometric mean over data sets; {absolute:,.0f} against {oracle:,.0f} as plain
means). It spent {spent:.0%} of the grid's MACs.

![auto against every size of the grid](sizes.png)

## Against gradient boosting, on tables

{boosting}

Positive is better for auto. Over these data sets the mean difference is {boost:+.2f} points.

## Verdict

{verdict}

**Command.** `python experiments/auto_size/run.py`: {made} of {planned} jobs ({failed} failed) in
{minutes:.1f} minutes with {processes} processes (Python {python},
torch {torch}, scikit-learn {sklearn}, {machine}). `results.csv` has a row for every run and search, `paths/` every search in
full. This file is written by `report.py`."""


def write_report(folder: Path) -> None:
    """``README.md`` and ``sizes.png`` from ``results.csv`` and ``about.json`` of a folder."""
    rows = pd.read_csv(folder / "results.csv", dtype={"size": str})
    about = json.loads((folder / "about.json").read_text())
    names = [name for name in FROM if {"auto", "static"} <= set(rows[rows["name"] == name]["kind"])]
    judged = [one for one in (judge(rows, name) for name in names) if one["pairs"]]
    if not judged:
        raise SystemExit(f"{folder}: no data set has a whole grid and a search of auto; give more time.")
    draw(judged, folder / "sizes.png")
    (folder / "README.md").write_text(text(rows, judged, about) + "\n")


def judge(rows: pd.DataFrame, name: str) -> dict[str, Any]:
    """One data set: auto against the oracle, the grid's choice and the boosting, over the pairs in which all grid runs and auto ended."""
    mine = rows[rows["name"] == name]
    static, auto = mine[mine["kind"] == "static"], mine[mine["kind"] == "auto"].set_index("pair")
    counts = static.groupby("pair").size()
    pairs = sorted(set(counts[counts == RUNS].index) & set(auto.index))
    if not pairs:
        return {"name": name, "pairs": 0}
    static, auto = static[static["pair"].isin(pairs)], auto.loc[pairs]
    chosen = static.loc[static.groupby(["size", "pair"])["validation"].idxmax()]
    by_size = chosen.groupby("size").agg({"test": "mean", "parameters": "mean"}).sort_values("parameters")
    oracle = chosen[chosen["size"] == by_size["test"].idxmax()].set_index("pair").loc[pairs]
    choice = static.loc[static.groupby("pair")["validation"].idxmax()].set_index("pair").loc[pairs]
    boosted = mine[mine["kind"] == "boosting"].set_index("pair")
    boosted = boosted.loc[[pair for pair in pairs if pair in boosted.index]]
    grid = static.groupby("pair")["macs"].sum()
    return {
        "name": name,
        "pairs": len(pairs),
        "sizes": by_size,
        "oracle": oracle,
        "choice": choice,
        "auto": auto,
        "boosted": boosted,
        "spent": float((auto["macs"] / grid.loc[pairs]).mean()),
        "difference": POINTS * (auto["test"] - oracle["test"]).to_numpy(),
        "to_choice": POINTS * (auto["test"] - choice["test"]).to_numpy(),
        "to_boosting": POINTS * (auto.loc[boosted.index]["test"] - boosted["test"]).to_numpy(),
    }


def interval(values: Sequence[float]) -> str:
    """The mean with its 95 % interval by the t distribution."""
    from scipy import stats

    found = np.asarray(values, dtype=float)
    if len(found) < 2:
        return f"{found.mean():+.2f}"
    half = stats.t.ppf(0.975, len(found) - 1) * found.std(ddof=1) / np.sqrt(len(found))
    return f"{found.mean():+.2f} ({found.mean() - half:+.2f} … {found.mean() + half:+.2f})"


def text(rows: pd.DataFrame, judged: list[dict[str, Any]], about: dict[str, Any]) -> str:
    """The README."""
    differences = np.array([one["difference"].mean() for one in judged])
    parameters = [(one["auto"]["parameters"].mean(), one["oracle"]["parameters"].mean()) for one in judged]
    boosted = [one for one in judged if len(one["boosted"])]
    most = max(one["pairs"] for one in judged)
    ratio = float(np.exp(np.mean([np.log(one["auto"]["parameters"] / one["oracle"]["parameters"]).mean() for one in judged])))
    spent = float(np.mean([one["spent"] for one in judged]))
    within = int((differences >= -ALLOWED).sum())
    boost = float(np.mean([one["to_boosting"].mean() for one in boosted])) if boosted else float("nan")
    return TEXT.format(
        allowed=ALLOWED,
        count=len(judged),
        data="\n".join(f"- `{one['name']}` – {FROM[one['name']]}" for one in judged),
        pairs=most,
        complete=sum(one["pairs"] == most for one in judged),
        trials=int(rows[rows["kind"] == "boosting"]["attempts"].max()) if boosted else 0,
        grid=_grid_table(judged),
        within=within,
        mean=differences.mean(),
        median=np.median(differences),
        choice=np.mean([one["to_choice"].mean() for one in judged]),
        ratio=ratio,
        absolute=np.mean([auto for auto, _ in parameters]),
        oracle=np.mean([oracle for _, oracle in parameters]),
        spent=spent,
        boosting=_boosting_table(boosted),
        boost=boost,
        verdict="\n".join(f"- {line}" for line in _verdict(judged, differences, ratio, spent, boosted)),
        **{key: about[key] for key in ("made", "failed", "planned", "minutes", "processes", "python", "torch", "sklearn", "machine")},
    )


def _grid_table(judged: list[dict[str, Any]]) -> str:
    lines = [
        "| data | pairs | oracle: size | parameters | test | grid's choice: test | auto: test | parameters "
        "| difference to the oracle | spent |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for one in judged:
        oracle, auto = one["oracle"], one["auto"]
        cells = [f"`{one['name']}`", str(one["pairs"]), str(oracle["size"].iloc[0]), f"{oracle['parameters'].mean():,.0f}"]
        cells += [f"{POINTS * oracle['test'].mean():.2f}", f"{POINTS * one['choice']['test'].mean():.2f}"]
        cells += [f"{POINTS * auto['test'].mean():.2f}", f"{auto['parameters'].mean():,.0f}", interval(one["difference"])]
        lines.append(f"| {' | '.join([*cells, format(one['spent'], '.0%')])} |")
    return "\n".join(lines)


def _boosting_table(boosted: list[dict[str, Any]]) -> str:
    lines = ["| data | pairs | boosting: test | auto: test | difference |", "|---|---|---|---|---|"]
    for one in boosted:
        tested, mine = one["boosted"]["test"], one["auto"].loc[one["boosted"].index]["test"]
        cells = [f"`{one['name']}`", str(len(tested)), f"{POINTS * tested.mean():.2f}", f"{POINTS * mine.mean():.2f}"]
        lines.append(f"| {' | '.join([*cells, interval(one['to_boosting'])])} |")
    return "\n".join(lines)


def _verdict(
    judged: list[dict[str, Any]], differences: np.ndarray[Any, Any], ratio: float, spent: float, boosted: list[dict[str, Any]]
) -> list[str]:
    """A sentence for each claim, held or not."""
    missed = [f"`{one['name']}` ({gap:+.2f})" for one, gap in zip(judged, differences, strict=True) if gap < -ALLOWED]
    lines = [
        f"Within {ALLOWED} point of the oracle on every data set: "
        + ("yes." if not missed else f"no, not on {', '.join(missed)}. The mean over data sets is {differences.mean():+.2f}.")
    ]
    plain = np.mean([one["auto"]["parameters"].mean() for one in judged]) < np.mean([one["oracle"]["parameters"].mean() for one in judged])
    held = {(True, True): "yes, by both means", (False, False): "no, by neither mean"}
    lines.append(
        f"Fewer parameters than the oracle on average: {held.get((bool(plain), ratio < 1), 'by one of the two means alone')} "
        f"({ratio:.2f} times in the geometric one)."
    )
    lines.append(f"At most half of the grid's MACs: {'yes' if spent <= SHARE else 'no'} ({spent:.0%}).")
    if boosted:
        ahead = [f"`{one['name']}`" for one in boosted if one["to_boosting"].mean() > 0]
        lines.append(
            f"On {len(ahead)} of {len(boosted)} tables auto is ahead of the tuned boosting by the mean"
            f"{': ' + ', '.join(ahead) if ahead else ''}{'; on the others boosting is' if len(ahead) < len(boosted) else ''}."
        )
    lines.append(
        "The pairs are few and some test sets small, so the intervals are wide: nothing here is a verdict about a single data set."
    )
    return lines


def draw(judged: list[dict[str, Any]], path: Path) -> None:
    """A panel a data set: every static size with its settings chosen on validation, and every search of auto."""
    from matplotlib.figure import Figure

    columns = min(5, len(judged))
    lines = -(-len(judged) // columns)
    figure = Figure(figsize=(3.0 * columns, 2.7 * lines), layout="constrained")
    for at, one in enumerate(judged):
        axes = figure.add_subplot(lines, columns, at + 1)
        axes.plot(one["sizes"]["parameters"], POINTS * one["sizes"]["test"], "o-", color="#555555", ms=4, lw=1, label="grid, mean")
        axes.plot(one["auto"]["parameters"], POINTS * one["auto"]["test"], "x", color="#D55E00", ms=5, lw=0, label="auto, each pair")
        mean = one["auto"]["parameters"].mean(), POINTS * one["auto"]["test"].mean()
        axes.plot(*mean, "D", color="#D55E00", ms=7, lw=0, label="auto, mean")
        if len(one["boosted"]):
            axes.axhline(POINTS * one["boosted"]["test"].mean(), color="#0072B2", lw=1, ls=":", label="boosting, mean")
        axes.set_xscale("log")
        axes.set_title(one["name"], fontsize=9)
        axes.set_xlabel("parameters", fontsize=8)
        axes.set_ylabel("test, points" if at % columns == 0 else "", fontsize=8)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.25, lw=0.5)
        if at == 0:
            axes.legend(fontsize=6, frameon=False)
    figure.savefig(path, dpi=130, metadata={"Software": None})


if __name__ == "__main__":
    write_report(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
