"""A study of arms that all tune one learning rate: its command line, its runs, its verdicts, its figure."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from study_runs import Row, TimeLimit, best, between_marks, carry_out, cost_line, in_words, job, mean, note_machine, read, tuning_jobs

RATES = (1e-3, 3e-3, 1e-2, 3e-2)


@dataclass(frozen=True)
class Study:
    """What is run and judged; ``metrics`` say which way is better, and tuning is by ``judge``, the accuracy on the judge set."""

    folder: Path
    one: Callable[[Row], Row]
    arms: tuple[str, ...]
    untuned: tuple[str, ...]
    blocks: tuple[str, ...]
    metrics: Mapping[str, str]
    costs: tuple[str, ...]
    reference: str
    effect: float
    rates: tuple[float, ...] = RATES
    steps: int = 600
    seeds: int = 15
    tune_seeds: int = 3

    def main(self, arguments: list[str]) -> int:
        """Tune, run, judge, write."""
        parser = argparse.ArgumentParser(description=f"the study {self.folder.name}; its README says what it asks")
        parser.add_argument("--out", type=Path, default=self.folder)
        parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
        parser.add_argument("--minutes", type=float, default=0.0, help="begin no run that would end later; 0: no limit")
        parser.add_argument("--quick", action="store_true", help="short runs, two seeds, two rates")
        parser.add_argument("--again", action="store_true", help="no runs: from the files alone")
        options = parser.parse_args(arguments)
        if not options.again:
            self._run(options)
        self.report(read(options.out / "runs.csv"), options.out)
        return 0

    def _run(self, options: argparse.Namespace) -> None:
        limit, quick = TimeLimit(options.minutes), options.quick
        note_machine(options.out, options.workers)
        steps = 100 if quick else self.steps
        grid = [{"lr": rate} for rate in (self.rates[1:3] if quick else self.rates)]
        tuned = {arm: grid for arm in self.arms if arm not in self.untuned}
        jobs = tuning_jobs(tuned, self.blocks, 1 if quick else self.tune_seeds, steps=steps)
        chosen = best(carry_out(self.one, jobs, options.out / "tuning.csv", options.workers, limit), "judge")
        jobs = [
            job(arm, block, seed, chosen.get((arm, block), {"lr": 0.0}), steps=steps)
            for seed in range(2 if quick else self.seeds)
            for block in self.blocks
            for arm in self.arms
        ]
        carry_out(self.one, jobs, options.out / "runs.csv", options.workers, limit)

    def report(self, rows: list[Row], out: Path) -> None:
        """One verdict a metric, arm and block; the figure; the table, in the README too where that has marks."""
        import pandas as pd

        from esper.compare import judge

        lines = ["| block | arm | runs | " + " | ".join(f"{m} | against {self.reference} | verdict" for m in self.metrics)]
        lines[0] += " | " + " | ".join(self.costs) + " | rate | seconds |"
        lines.append("|" + "---|" * (lines[0].count("|") - 1))
        found = {}
        for metric, direction in self.metrics.items():
            frame = pd.DataFrame([{name: row[name] for name in ("arm", "block", "seed", metric)} for row in rows])
            judged = judge(
                frame, arm="arm", metric=metric, pair="seed", block="block", direction=direction, reference=self.reference,
                minimum_effect=self.effect, pooling="apart",
            )  # fmt: skip
            judged.write(out / f"comparison_{metric}", figures=False)
            found[metric] = {(row.block.split("=")[-1], row.arm.split("=")[-1]): row for row in judged.comparison.verdicts}
        for block in self.blocks:
            for arm in self.arms:
                mine = [row for row in rows if (row["block"], row["arm"]) == (block, arm)]
                if not mine:
                    continue
                cells = [block, arm, str(len(mine))]
                for metric in self.metrics:
                    row = found[metric].get((block, arm))
                    cells.append(f"{mean(one[metric] for one in mine):.4f}")
                    cells += [f"{row.difference:+.4f}", in_words(row.verdict)] if row else ["–", "reference"]
                cells += [f"{mean(one[name] for one in mine):.0f}" for name in self.costs]
                cells += [f"{mine[0]['settings']['lr']:g}", f"{mean(one['seconds'] for one in mine):.1f}"]
                lines.append("| " + " | ".join(cells) + " |")
        text = "\n".join([cost_line(out), "", *lines])
        (out / "results.md").write_text(text + "\n", encoding="utf-8")
        if (out / "README.md").exists():
            between_marks(out / "README.md", "results", text)
        self._figure(rows, out / "arms.png")
        print(text, flush=True)

    def _figure(self, rows: list[Row], path: Path) -> None:
        import matplotlib as mpl

        mpl.use("Agg")
        from matplotlib import pyplot

        size = (4 * len(self.blocks), 3.2 * len(self.metrics))
        figure, axes = pyplot.subplots(len(self.metrics), len(self.blocks), figsize=size, squeeze=False)
        for line, metric in zip(axes, self.metrics, strict=True):
            for axis, block in zip(line, self.blocks, strict=True):
                values = [[row[metric] for row in rows if (row["block"], row["arm"]) == (block, arm)] for arm in self.arms]
                axis.boxplot(values)
                axis.set_xticks(range(1, len(self.arms) + 1), self.arms, rotation=40, ha="right")
                axis.set(title=block, ylabel=metric)
        figure.tight_layout()
        figure.savefig(path, dpi=110)
        pyplot.close(figure)
