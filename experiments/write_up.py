"""Write a study's README from its finished sweep, so that no number is typed by hand.

    python experiments/write_up.py <folder of the sweep> experiments/<study>

The study's question stands in ``question.md`` of its folder; everything else comes from the sweep.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
from pathlib import Path
from typing import Any

TEXT = """# {title}

{question}

**Plan** (saved before the first run, `plan.json`): {metric}, {direction}; {pairs} pairs; reference `{reference}`;
smallest difference worth having {minimum:g}; α = {alpha:g} after Holm.

**Command.** `{command}`

{table}

Difference and interval are to the reference, positive is better; p-values after Holm; cost is the mean of a run.

![every pair](pairs.png)
{cost_figure}
**Verdict.**

{sentences}

**What it cost.** {runs} runs, {hours:.2f} hours of training loop in all, on {machine}.
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
    return [*exploratory, *result["conclusion"], *(row["sentence"] for row in result["verdicts"]), *result["notes"]]


def _table(result: dict[str, Any]) -> str:
    lines = [
        "| arm | mean | failed | MACs | parameters | germinated / fossils / culls "
        "| difference | interval | p | verdict |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    rows = {(row["arm"], row["block"]): row for row in result["verdicts"]}
    for arm in result["arms"]:
        row = rows.get((arm["arm"], arm["block"]))
        growth = " / ".join(f"{arm['growth'].get(name, 0):.1f}" for name in ("germinations", "fossils", "culls"))
        cost = f"{arm['costs']['macs']:.3g} | {arm['costs']['parameters']:.0f}"
        name = " ".join(part for part in (arm["block"], arm["arm"]) if part)
        judged = "– | – | – | reference"
        if row:
            low, high = (f"{end:+.3g}" if end is not None else "∞" for end in row["interval"])
            judged = f"{row['difference']:+.3g} | {low} … {high} | {row['p_holm']:.2g} | {row['verdict']}"
        lines.append(
            f"| {name} | {arm['mean']:.4g} | {arm['failed']} of {arm['runs']} | {cost} | {growth} | {judged} |"
        )
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
