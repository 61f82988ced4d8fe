"""Verdicts by ``esper.compare.judge``, the figure and the README's tables, from the rows of ``runs.csv``."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from study_runs import Row, between_marks, cost_line, in_words, mean

from esper.compare import Judged, judge

REFERENCE = "continual_backprop"
EFFECT = 0.01  # one point of accuracy
ORDER = ("sgd", "adam", "l2_init", "shrink_perturb", "continual_backprop", "grown", "grown_l2", "kept", "host")


def report(rows: list[Row], out: Path) -> None:
    """Write ``comparison/``, ``decline/``, ``curves.png`` and, where the README has marks, its tables."""
    rows = [row for row in rows if row["arm"] in ORDER]
    verdicts, declines = against(rows), decline(rows)
    verdicts.write(out / "comparison", figures=False)
    declines.write(out / "decline", figures=False)
    _figure(rows, out / "curves.png")
    text = "\n".join([cost_line(out), "", *_table(rows, verdicts, declines)])
    (out / "results.md").write_text(text + "\n", encoding="utf-8")
    readme = out / "README.md"
    if readme.exists():
        between_marks(readme, "results", text)
    print(text, flush=True)


def against(rows: list[Row]) -> Judged:
    """Accuracy in the last quarter of the stream, every arm against continual backprop, paired by seed, on either stream."""
    frame = pd.DataFrame([{name: row[name] for name in ("arm", "block", "seed", "late_accuracy", "seconds")} for row in rows])
    return judge(
        frame, arm="arm", metric="late_accuracy", pair="seed", block="block", direction="max", reference=REFERENCE,
        minimum_effect=EFFECT, pooling="apart", cost="seconds",
    )  # fmt: skip


def decline(rows: list[Row]) -> Judged:
    """The last tenth of the stream against its second tenth, paired by seed, for every arm and stream."""
    parts = sorted(name for name in rows[0] if name.startswith("part"))
    tenth = max(1, len(parts) // 10)
    places = {"second tenth": parts[tenth : 2 * tenth], "last tenth": parts[-tenth:]}
    frame = pd.DataFrame(
        [
            {"time": time, "block": f"{row['block']} {row['arm']}", "seed": row["seed"], "accuracy": mean(row[name] for name in names)}
            for row in rows
            for time, names in places.items()
        ]
    )
    return judge(
        frame, arm="time", metric="accuracy", pair="seed", block="block", direction="max", reference="second tenth",
        minimum_effect=EFFECT, pooling="apart",
    )  # fmt: skip


def _table(rows: list[Row], verdicts: Judged, declines: Judged) -> list[str]:
    found = {(row.block, row.arm): row for row in verdicts.comparison.verdicts}
    falls = {row.block: row for row in declines.comparison.verdicts}
    lines = [
        "| stream | arm | runs | accuracy, last quarter | against continual backprop | verdict | last tenth − second tenth | verdict "
        "| parameters | branches taken away a run | seconds |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for block in sorted({row["block"] for row in rows}):
        for arm in ORDER:
            mine = [row for row in rows if (row["block"], row["arm"]) == (block, arm)]
            if not mine:
                continue
            row = next((r for (b, a), r in found.items() if _is(b, block) and _is(a, arm)), None)
            fall = next((r for b, r in falls.items() if _is(b, f"{block} {arm}")), None)
            costs = [mean(one[name] for one in mine) for name in ("parameters", "culled", "seconds")]
            lines.append(
                f"| {block} | {arm} | {len(mine)} | {mean(one['late_accuracy'] for one in mine):.4f} | "
                + (f"{row.difference:+.4f} | {in_words(row.verdict)}" if row else "– | reference")
                + " | "
                + (f"{fall.difference:+.4f} | {in_words(fall.verdict)}" if fall else "– | –")
                + f" | {costs[0]:.0f} | {costs[1]:.0f} | {costs[2]:.0f} |"
            )
    return lines


def _is(label: str, name: str) -> bool:
    return label == name or label.split("=")[-1] == name


def _figure(rows: list[Row], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    blocks = sorted({row["block"] for row in rows})
    figure, axes = pyplot.subplots(1, len(blocks), figsize=(6 * len(blocks), 4), squeeze=False)
    for axis, block in zip(axes[0], blocks, strict=True):
        for arm in ORDER:
            mine = [row for row in rows if (row["block"], row["arm"]) == (block, arm)]
            if mine:
                parts = sorted(name for name in mine[0] if name.startswith("part"))
                axis.plot([mean(row[name] for row in mine) for name in parts], label=arm, lw=2.5 if arm.startswith("grown") else 1.2)
        axis.set(title=f"{block} digits", xlabel="part of the stream", ylabel="online accuracy")
    axes[0][-1].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
