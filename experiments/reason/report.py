"""Judge the study of reasoning at equal validation loss, and write it up.

    python experiments/reason/report.py <folder of the sweep>

Every grown net is compared with the final net from scratch at its MACs and with its seed, after that net's share of solved problems
has been moved to the grown net's loss, along the line through the nets from scratch with fewer and with all steps; all seeds share its
slope. The plan of this comparison is ``matched_plan.json``. Writes matched.csv, matched.png, findings.md, README.md, runs.csv and the
sweep's results beside itself, or into ``--out``.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from esper.compare.config import CompareConfig
from esper.compare.judging import Judged, judge_runs
from esper.compare.results.registered_plans import parse_registered
from esper.compare.sources.files import own_table
from esper.compare.sources.selection import Selection, gather

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))
from study_runs import in_words  # noqa: E402
from write_up import rows_of, write_up  # noqa: E402

GROWN, FEWER, ALL, SMALL = "half_50", "deep_75", "deep", "half"
NAMES = {GROWN: "grown, 2→4 at 50 %", FEWER: "from scratch, at its MACs", ALL: "from scratch, all steps", SMALL: "small host, all steps"}
KINDS = ("copying", "assignment_0", "assignment_1", "assignment_2", "adding")
LOSSES = {"text_loss": "the text alone", "loss": "text and answers"}
"""The loss at which the nets are compared: the first by the plan, the second beside it."""
Arms = dict[str, dict[int, dict[str, Any]]]
"""Arm → seed → row of its run."""


def slope(arms: Arms, kind: str, loss: str) -> float:
    """Change of the share of solved problems per nat of loss, between the two lengths of the net from scratch; one slope for all seeds."""
    seeds = arms[ALL].keys() & arms[FEWER].keys()
    solved, losses = (
        np.array([arms[ALL][seed][f"test/{name}"] - arms[FEWER][seed][f"test/{name}"] for seed in sorted(seeds)]) for name in (kind, loss)
    )
    return float((solved * losses).sum() / (losses**2).sum())


def matched(arms: Arms, loss: str) -> pd.DataFrame:
    """A row an arm, kind of problem and seed: what the grown net solves, and what the net from scratch solves at the grown net's loss."""
    rows = []
    for kind in KINDS:
        change = slope(arms, kind, loss)
        for seed in sorted(arms[GROWN].keys() & arms[FEWER].keys()):
            grown, scratch = arms[GROWN][seed], arms[FEWER][seed]
            moved = scratch[f"test/{kind}"] + change * (grown[f"test/{loss}"] - scratch[f"test/{loss}"])
            for arm, solved in (("grown", grown[f"test/{kind}"]), ("scratch", moved)):
                rows.append({"arm": arm, "kind": kind, "seed": seed, "solved": solved, "slope": change})
    return pd.DataFrame(rows)


def judged(frame: pd.DataFrame) -> Judged:
    """The verdicts on the matched runs, by the plan that was registered."""
    registered = parse_registered((HERE / "matched_plan.json").read_text(encoding="utf-8"), "matched_plan.json")
    selection = {key: tuple(value) if isinstance(value, list) else value for key, value in registered.selection.items()}
    chosen = Selection(**selection)
    gathered = gather(own_table(frame, "matched.csv"), chosen, registered.plan.direction)
    return judge_runs(gathered, chosen, CompareConfig(), registered)


def findings(arms: Arms, verdicts: dict[str, Judged]) -> str:
    """The verdicts at equal loss, and what every arm solves, as tables."""
    lines = ["![share of solved problems at equal loss](matched.png)", ""]
    for loss, result in verdicts.items():
        lines += [f"The grown net against the net from scratch, moved to the same loss of {LOSSES[loss]}:", ""]
        lines += ["| problems | difference | interval | p | verdict | slope a nat |", "|---|---|---|---|---|---|"]
        for row in result.comparison.verdicts:
            kind = row.block.split("=")[-1]
            change = f"{slope(arms, kind, loss):+.2f}" if kind in KINDS else "–"
            low, high = row.interval
            told = f"{row.difference:+.4f} | {low:+.4f} … {high:+.4f} | {row.p_holm:.2g} | {in_words(row.verdict)}"
            lines.append(f"| {kind if kind in KINDS else 'all kinds'} | {told} | {change} |")
        lines.append("")
    lines += ["| arm | runs | text loss | loss | " + " | ".join(KINDS) + " |", "|---|" + "---|" * (len(KINDS) + 3)]
    for arm, name in NAMES.items():
        rows = list(arms[arm].values())
        cells = [f"{np.mean([row[f'test/{key}'] for row in rows]):.4f}" for key in (*LOSSES, *KINDS)] if rows else []
        lines.append(f"| {name} | {len(rows)} | " + " | ".join(cells or ["–"] * (len(KINDS) + 2)) + " |")
    lines += [f"\nExploratory: {reason}." for reason in verdicts["text_loss"].comparison.exploratory]
    return "\n".join(lines)


def draw(arms: Arms, frame: pd.DataFrame, path: Path) -> None:
    """Share of solved problems against text loss, a panel a kind: every run, and every pair of lengths from scratch as a line."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.9 * len(KINDS), 3.4), layout="constrained")
    panels = figure.subplots(1, len(KINDS), sharex=True)
    colours = {GROWN: "C3", FEWER: "C0", ALL: "C2", SMALL: "0.6"}
    for axes, kind in zip(panels, KINDS, strict=True):
        for seed in sorted(arms[ALL].keys() & arms[FEWER].keys()):
            ends = [arms[arm][seed] for arm in (FEWER, ALL)]
            axes.plot([row["test/text_loss"] for row in ends], [row[f"test/{kind}"] for row in ends], color="0.85", linewidth=1, zorder=0)
        for arm, name in NAMES.items():
            rows = list(arms[arm].values())
            at = [[row[key] for row in rows] for key in ("test/text_loss", f"test/{kind}")]
            axes.scatter(*at, s=16, color=colours[arm], label=name, linewidths=0)
        wide = frame[frame.kind == kind].pivot(index="seed", columns="arm", values="solved")
        axes.set_title(f"{kind}\n{100 * (wide['grown'] - wide['scratch']).mean():+.1f} points at equal text loss", fontsize=9)
        axes.set_xlabel("loss on text [nats a byte]", fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("share of problems solved")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(NAMES), frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", type=Path)
    parser.add_argument("--out", type=Path, default=HERE)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    if not (given.out / "question.md").exists():
        shutil.copy(HERE / "question.md", given.out)
    arms: Arms = defaultdict(dict)
    for row in rows_of(given.sweep):
        if row["kind"] == "compared" and row["status"] == "FINISHED":
            arms[row["arm"]][int(row["seed"])] = row
    if not arms[GROWN].keys() & arms[FEWER].keys() & arms[ALL].keys():
        raise SystemExit(f"No pair of {given.sweep} has finished with {GROWN}, {FEWER} and {ALL}: there is nothing to compare.")
    frames = {loss: matched(arms, loss) for loss in LOSSES}
    pd.concat([frame.assign(loss=loss) for loss, frame in frames.items()]).to_csv(given.out / "matched.csv", index=False)
    verdicts = {loss: judged(frame) for loss, frame in frames.items()}
    draw(arms, frames["text_loss"], given.out / "matched.png")
    (given.out / "findings.md").write_text(findings(arms, verdicts) + "\n", encoding="utf-8")
    write_up(given.sweep, given.out)


if __name__ == "__main__":
    main()
