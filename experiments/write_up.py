"""Write a study's README from its finished sweep, so that no number is typed by hand.

    python experiments/write_up.py <folder of the sweep> experiments/<study>

The study's question stands in ``question.md`` of its folder; everything else comes from the sweep.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shlex
import shutil
from collections import Counter
from datetime import datetime
from pathlib import Path
from typing import Any

from esper.compare.results.comparison import format_values
from esper.compare.results.sentences import confidence

TEXT = """# {title}

{question}

**Plan** (saved before the first run, `plan.json`): {metric}, {direction}; {pairs} pairs; reference `{reference}`;
smallest difference worth having {minimum:g}; α = {alpha:g} after Holm.

**Command.** `{command}`

{table}

Differences and intervals are against the reference; positive is better. P-values and the levels of the intervals are after Holm. Costs
are means over the runs; seconds are wall time in the step loop.

![every pair](pairs.png)
{cost_figure}
**Verdict.**

{sentences}
{ranking}
**What it cost.** {runs} runs, {hours:.2f} hours of training loop in all, {wall:.2f} hours of wall time from the first line of the
first job's log to the last one's last, on {machine}.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", type=Path)
    parser.add_argument("study", type=Path)
    given = parser.parse_args()
    result = json.loads((given.sweep / "comparison.json").read_text())
    for name in ("comparison.json", "plan.json"):
        shutil.copy(given.sweep / name, given.study / name)
    figures = sorted((given.sweep / "figures").glob("*.png"))
    for figure in figures:
        shutil.copy(figure, given.study / figure.name)
    costs = [f"![{figure.stem}]({figure.name})\n" for figure in figures if figure.stem.startswith("cost")]
    question = (given.study / "question.md").read_text().strip()
    title, _, rest = question.partition("\n")
    summaries = [json.loads(path.read_text()) for path in given.sweep.glob("*/summary.json")]
    plan = result["plan"]
    text = TEXT.format(
        title=title.lstrip("# "),
        question=rest.strip(),
        metric=plan["metric"],
        direction={"max": "larger is better", "min": "smaller is better"}[plan["direction"]],
        pairs=len(plan["seeds"]),
        reference=plan["reference"],
        minimum=plan["minimum_effect"],
        alpha=plan["alpha"],
        command=_command(given.sweep),
        table=_table(result),
        cost_figure="\n".join(costs),
        sentences="\n".join(f"- {line}" for line in _sentences(result)),
        ranking=_ranking(result),
        wall=_wall(given.sweep) / 3600,
        runs=sum(arm["runs"] for arm in result["arms"]),
        hours=sum(summary["seconds"]["total"] for summary in summaries) / 3600,
        machine=_machine(summaries),
    )
    (given.study / "README.md").write_text(text)


def _command(sweep: Path) -> str:
    words = json.loads((sweep / "sweep.json").read_text())["command"]
    return shlex.join(["esper", *(word for word in words if not word.startswith(("output=", "hydra.sweep.dir=")))])


def _sentences(result: dict[str, Any]) -> list[str]:
    exploratory = [f"Exploratory: {reason}." for reason in result["exploratory"]]
    tuned = [_tuned(one, result["plan"]["metric"]) for one in result.get("tuned", [])]
    return [*exploratory, *result["conclusion"], *(row["sentence"] for row in result["verdicts"]), *tuned, *result["notes"]]


def _tuned(one: dict[str, Any], metric: str) -> str:
    """What an arm chose before the comparison, and what choosing cost."""
    name = " ".join(part for part in (one["arm"], one["block"]) if part)
    rows = [(format_values(row["values"]), _mean(row["mean"]), row["failed"], row["runs"]) for row in one["tried"]]
    tried = "; ".join(f"{values}: {mean}, {failed} of {runs} failed" for values, mean, failed, runs in rows)
    return f"{name} was tuned to {format_values(one['values'])} for {one['macs']:.3g} MACs (validation {metric} by values: {tried})."


def _ranking(result: dict[str, Any]) -> str:
    """Arms from best to worst with those that each is surely better than; empty where the sweep was not asked for it."""
    rows = result["ranking"]
    if not rows:
        return ""
    better: dict[str, list[str]] = {}
    for row in rows:
        if row["verdict"] in ("B better", "A better"):
            winner, loser = (row["arm"], row["reference"]) if row["verdict"] == "B better" else (row["reference"], row["arm"])
            better.setdefault(winner, []).append(loser)
    means: dict[str, list[float]] = {}
    for arm in result["arms"]:
        means.setdefault(arm["arm"], []).append(math.nan if arm["mean"] is None else arm["mean"])
    over = {arm: sum(values) / len(values) for arm, values in means.items()}
    sign = 1 if result["plan"]["direction"] == "max" else -1
    order = sorted(over, key=lambda arm: -sign * over[arm] if math.isfinite(over[arm]) else math.inf)
    counts = Counter(row["verdict"] if row["verdict"] in ("equivalent", "inconclusive") else "decided" for row in rows)
    told = ", ".join(f"{counts[name]} {name}" for name in ("decided", "equivalent", "inconclusive"))
    lines = [f"| {arm} | {_mean(over[arm])} | {', '.join(better.get(arm, [])) or '–'} |" for arm in order]
    head = f"**All against all** ({len(rows)} pairs of arms, after Holm: {told})."
    return "\n".join(["", head, "", "| arm | mean | surely better than |", "|---|---|---|", *lines, ""])


def _mean(value: float | None) -> str:
    return f"{value:.4g}" if value is not None and math.isfinite(value) else "–"


def _wall(sweep: Path) -> float:
    """Seconds from the first dated line in the jobs' logs to the last."""
    dated = re.compile(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}", re.MULTILINE)
    found = [text for path in sweep.glob("*/job.log") for text in dated.findall(path.read_text(encoding="utf-8"))]
    first, last = (datetime.strptime(text, "%Y-%m-%d %H:%M:%S,%f") for text in (min(found), max(found)))
    return (last - first).total_seconds()


def _table(result: dict[str, Any]) -> str:
    lines = [
        "| arm | mean | failed | MACs | seconds | parameters | germinated / fossils / culls | difference | interval | p | verdict |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    rows = {(row["arm"], row["block"]): row for row in result["verdicts"]}
    for arm in result["arms"]:
        row = rows.get((arm["arm"], arm["block"]))
        growth = " / ".join(f"{arm['growth'].get(name, 0):.1f}" for name in ("germinations", "fossils", "culls"))
        cost = f"{arm['costs']['macs']:.3g} | {arm['costs']['seconds']:.3g} | {arm['costs']['parameters']:.0f}"
        name = " ".join(part for part in (arm["block"], arm["arm"]) if part)
        judged = "– | – | – | reference"
        if row:
            low, high = (f"{end:+.3g}" if end is not None else "∞" for end in row["interval"])
            interval = f"{low} … {high} ({confidence(row['level'])})"
            judged = f"{row['difference']:+.3g} | {interval} | {row['p_holm']:.2g} | {row['verdict']}"
        lines.append(f"| {name} | {arm['mean']:.4g} | {arm['failed']} of {arm['runs']} | {cost} | {growth} | {judged} |")
    return "\n".join(lines)


def _machine(summaries: list[dict[str, Any]]) -> str:
    found = summaries[0]["environment"]
    packages = found["packages"]
    commit = found["git"]["commit"][:10] + (" with changes" if found["git"]["changed"] else "")
    return (
        f"{found['device']} ({found['gpu'] or 'no GPU'}, {found['threads']} thread a run), Python {found['python']}, "
        f"torch {packages['torch']}, commit {commit}"
    )


if __name__ == "__main__":
    main()
