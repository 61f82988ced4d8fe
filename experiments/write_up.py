"""Write a study's README from its finished sweep, so that no number is typed by hand.

    python experiments/write_up.py <folder of the sweep> experiments/<study>

The study's question stands in ``question.md`` of its folder, what its own program adds in ``findings.md``, and what came of the predictions
in ``outcome.md``; everything else comes from the sweep, whose runs go into ``runs.csv``, those of tuning too.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import re
import shlex
import shutil
from collections import Counter
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from esper.compare.results.comparison import format_values
from esper.compare.results.sentences import confidence
from esper.tracking.run_info import flatten

#: Settings of the sweep as a whole, or of where its runs lie.
WHOLE = ("output", "resume", "name", "experiment", "task.cache")

TEXT = """# {title}

{question}
{findings}
**Plan** (saved before the first run, `plan.json`): {metric}, {direction}; {pairs} pairs; reference `{reference}`;
smallest difference worth having {minimum:g}; α = {alpha:g} after Holm.

**Command.** `{command}`

{table}

Differences and intervals are against {others}; positive is better. P-values and the levels of the intervals are after Holm. Costs
are means over the runs; seconds are wall time in the step loop.

![every pair](pairs.png)
{cost_figure}
**Verdict.**

{sentences}
{ranking}
**What it cost.** {runs} runs{left}, {hours:.2f} hours of training loop in all, {wall:.2f} hours of wall time from the first line of the
first job's log to the last one's last, on {machine}.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", type=Path)
    parser.add_argument("study", type=Path)
    given = parser.parse_args()
    write_up(given.sweep, given.study)


def write_up(sweep: Path, study: Path) -> None:
    """Write ``README.md`` and ``runs.csv`` of the study, and copy the sweep's results and figures beside them."""
    result = json.loads((sweep / "comparison.json").read_text())
    for name in ("comparison.json", "plan.json"):
        shutil.copy(sweep / name, study / name)
    write_rows(rows_of(sweep), study / "runs.csv")
    figures = sorted((sweep / "figures").glob("*.png"))
    for figure in figures:
        shutil.copy(figure, study / figure.name)
    costs = [f"![{figure.stem}]({figure.name})\n" for figure in figures if figure.stem.startswith("cost")]
    question = (study / "question.md").read_text().strip()
    title, _, rest = question.partition("\n")
    summaries = [json.loads(path.read_text()) for path in sweep.glob("*/summary.json")]
    plan = result["plan"]
    text = TEXT.format(
        title=title.lstrip("# "),
        question=rest.strip(),
        findings=_findings(study),
        others=f"`{plan['reference']}`, or the arm named" if plan.get("against") else "the reference",
        metric=plan["metric"],
        direction={"max": "larger is better", "min": "smaller is better"}[plan["direction"]],
        pairs=len(plan["seeds"]),
        reference=plan["reference"],
        minimum=plan["minimum_effect"],
        alpha=plan["alpha"],
        command=_command(sweep),
        table=_table(result),
        cost_figure="\n".join(costs),
        sentences="\n".join(f"- {line}" for line in _sentences(result)),
        ranking=_ranking(result),
        wall=_wall(sweep) / 3600,
        runs=len(summaries),
        left=_left(result),
        hours=sum(summary["seconds"]["total"] for summary in summaries) / 3600,
        machine=_machine(summaries),
    )
    (study / "README.md").write_text(text)


def rows_of(sweep: Path) -> list[dict[str, Any]]:
    """A row a run: where it belongs, the settings in which the runs differ, its results and its cost."""
    found = []
    for path in sorted(sweep.glob("*/summary.json")):
        summary, config = json.loads(path.read_text()), yaml.safe_load((path.parent / "config.yaml").read_text())
        settings = {key: value for key, value in flatten(config).items() if isinstance(value, (str, int, float)) and key not in WHOLE}
        final, seeds = (summary.get("metrics") or {}).get("final") or {}, summary.get("seeds") or {}
        costs = {"macs": summary.get("macs"), "parameters": (summary.get("parameters") or {}).get("after")}
        counts = {name: seeds.get(name) for name in ("germinated", "fossilized", "culled")}
        ended = {"seconds": (summary.get("seconds") or {}).get("total"), "status": summary.get("status")}
        kind = "tuning" if path.parent.name.startswith("tune-") else "compared"
        found.append({"kind": kind, **settings, **final, **costs, **counts, **ended, "fingerprint": summary.get("fingerprint")})
    varied = {key for row in found for key in row if len({repr(one.get(key)) for one in found}) > 1}
    always = ("kind", "arm", "seed", "status", "macs", "seconds")
    return [{key: value for key, value in row.items() if key in varied or key in always} for row in found]


def write_rows(rows: list[dict[str, Any]], path: Path) -> None:
    """The rows as CSV, with a column for every key of any of them."""
    columns = list(dict.fromkeys(["kind", "arm", "seed", *(key for row in rows for key in row)]))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _left(result: dict[str, Any]) -> str:
    """How many planned runs there was no time for, in words; nothing where all were made."""
    plan, made = result["plan"], sum(arm["runs"] for arm in result["arms"])
    planned = len(plan["arms"]) * len(plan["blocks"]) * len(plan["seeds"])
    return f" (of the {planned} that the plan compares there was time for {made})" if made < planned else ""


def _findings(study: Path) -> str:
    """What the study's own program wrote for the README, and what came of its predictions, between empty lines."""
    paths = [path for name in ("findings.md", "outcome.md") if (path := study / name).exists()]
    return "".join(f"\n{path.read_text().strip()}\n" for path in paths)


def _command(sweep: Path) -> str:
    words = json.loads((sweep / "sweep.json").read_text())["command"]
    told = [word for word in words if not word.startswith(("output=", "hydra.sweep.dir=", "task.cache="))]
    return shlex.join(["esper", *(re.sub(r"=/.*/([^/]+)$", r"=<the folder \1>", word) for word in told)])


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
        forms = {"macs": ".3g", "seconds": ".3g", "parameters": ".0f"}
        cost = " | ".join(_cost(arm["costs"].get(name), form) for name, form in forms.items())
        name = " ".join(part for part in (arm["block"], arm["arm"]) if part)
        judged = "– | – | – | reference"
        if row:
            low, high = (f"{end:+.3g}" if end is not None else "∞" for end in row["interval"])
            interval = f"{low} … {high} ({confidence(row['level'])})"
            other = f" to {row['reference']}" if row["reference"] != result["plan"]["reference"] else ""
            judged = f"{row['difference']:+.3g}{other} | {interval} | {row['p_holm']:.2g} | {row['verdict']}"
        lines.append(f"| {name} | {_mean(arm['mean'])} | {arm['failed']} of {arm['runs']} | {cost} | {growth} | {judged} |")
    return "\n".join(lines)


def _cost(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _machine(summaries: list[dict[str, Any]]) -> str:
    found = summaries[0]["environment"]
    packages = found["packages"]
    git = found["git"]  # no commit where the checkout came without its history
    commit = f", commit {git['commit'][:10]}{' with changes' if git['changed'] else ''}" if git["commit"] else ""
    return (
        f"{found['device']} ({found['gpu'] or 'no GPU'}, {found['threads']} thread a run), Python {found['python']}, "
        f"torch {packages['torch']}{commit}"
    )


if __name__ == "__main__":
    main()
