"""Writes README.md beside this file from the rows in ``results/``: ``python experiments/step_cost/report.py``."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
Row = Mapping[str, str]

TEXT = """# What do seeds cost in a training step?

**Question.** How much longer is a step of a host whose seeds are dormant, or partly growing, than a step of the bare host?
The limits on a CPU are 1.05 × bare for dormant seeds, and 1.25 × with 10 % of the seeds blending chunk-wide branches.

**Command.** `scripts/bench step --out experiments/step_cost/results/cpu.csv` (`--hosts`, `--arms` for a part, `--device cuda` for
the GPU's rows), `scripts/bench million --out experiments/step_cost/results/million.csv`, then
`python experiments/step_cost/report.py`, which writes this file. The limits are judged on the first table's machine, which did
nothing else. The other tables are of an earlier engine. Since then the engine copies a site's activation and its gradient once for all
its branches, steps the branches of all sites together, and keeps the memory of a step for the next one.

**How.** Two copies of one host run in one process, with and without seeds, in blocks of ten steps that take turns, so that
other load of the machine meets both. A ratio is the median over the pairs of blocks, with its 20th and 80th percentile in brackets. The
ratio of processor time stands beside it for the same reason. `mlp` is 784–1024–1024–10 with batches of 256 and 64 seeds a
site, `cnn` a residual net of 32 and 64 channels on 28×28 images with batches of 64 and 8 seeds at each of five convolutions,
`wide cnn` the same with 64 and 128 channels on 32×32 images, `small` 64–6–6–10 with batches of 64. `small` shows the time of
the interpreter, and so do the rows of the GPU, for which all hosts are small. Branches are `mlp` with {hidden} hidden units.

{tables}

## One million seeds in one model

{million}

A control tick is everything between two steps: ages, gates, commands, plans. Bytes are those of the table of seeds and of the last
health measurement of each seed.

## Verdict

{verdict}
"""


def rows_of(name: str) -> list[Row]:
    """The rows of one CSV."""
    with (FOLDER / "results" / name).open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def step_table(rows: Sequence[Row]) -> str:
    """Markdown of the rows of one machine."""
    lines = ["| host | seeds | ms a step | × bare | processor time × bare | limit |", "|---|---|---|---|---|---|"]
    for row in rows:
        limit = "" if row["limit"] == "nan" else f"{float(row['limit']):.2f} {'met' if met(row) else '**missed**'}"
        ratio = f"{float(row['ratio']):.2f} ({float(row['ratio_p20']):.2f} to {float(row['ratio_p80']):.2f})"
        lines.append(f"| {row['host']} | {row['arm']} | {float(row['p50_ms']):.2f} | {ratio} | {float(row['cpu_ratio']):.2f} | {limit} |")
    return "\n".join(lines)


def met(row: Row) -> bool:
    """Whether the row's ratio is within its limit."""
    return float(row["ratio"]) <= float(row["limit"])


def machine(rows: Sequence[Row]) -> str:
    """Where the rows were measured."""
    row, loads = rows[0], [float(row["load"]) for row in rows]
    return (
        f"{row['device']}, {row['threads']} thread, torch {row['torch']}, Python {row['python']}, {row['system']}, "
        f"{min(int(r['pairs']) for r in rows)} pairs or more, load {min(loads):.0f} to {max(loads):.0f}"
    )


def million_table(rows: Sequence[Row]) -> str:
    """Markdown of the rows of the million seeds."""
    lines = ["| seeds | ms a control tick | bytes a seed |", "|---|---|---|"]
    for row in rows:
        tick = f"{float(row['p50_ms']):.2f} ({float(row['p20_ms']):.2f} to {float(row['p80_ms']):.2f}; limit {float(row['limit_ms']):.0f})"
        lines.append(f"| {int(row['seeds']):,}, {row['case']} | {tick} | {float(row['bytes_per_seed']):.0f} (limit 64) |")
    return "\n".join(lines)


def verdict(rows: Sequence[Row]) -> str:
    """One sentence a limit."""
    said = []
    for row in rows:
        if row["limit"] != "nan":
            word = "met" if met(row) else "missed"
            said.append(f"- {row['host']}, {row['arm']}: {float(row['ratio']):.3f} × bare, limit {row['limit']}: {word}.")
    return "\n".join(said)


def main() -> None:
    """Write README.md."""
    from esper.blueprints.mlp import MLP

    cpu = rows_of("cpu.csv")
    machines = (cpu, rows_of("cpu_16_cores.csv"), rows_of("cuda_h200.csv"))
    tables = "\n\n".join(f"## {machine(rows)}\n\n{step_table(rows)}" for rows in machines)
    text = TEXT.format(tables=tables, million=million_table(rows_of("million.csv")), verdict=verdict(cpu), hidden=MLP().hidden)
    (FOLDER / "README.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
