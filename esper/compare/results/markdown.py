"""A comparison in Markdown: for a pull request, a README, or the description of a run in MLflow."""

from __future__ import annotations

from esper.compare.results.comparison import Comparison
from esper.compare.results.plan import Plan
from esper.compare.results.tables import Cells, arm_cells, cost_cells, overall_cells, title, verdict_cells


def markdown(comparison: Comparison, plan: Plan) -> str:
    """Verdicts, arms, costs and notes under headings."""
    parts = [f"# {title(plan)}", *verdicts(comparison), "## Arms", table(arm_cells(comparison))]
    if comparison.overall:
        parts += ["## Over all blocks", table(overall_cells(comparison))]
    if (costs := cost_cells(comparison)).rows:
        parts += ["## Cost", table(costs)]
    return "\n\n".join(parts) + "\n"


def verdicts(comparison: Comparison) -> list[str]:
    """What is exploratory, the conclusion, the sentences, the table of verdicts and the notes."""
    parts = [f"**Exploratory:** {'; '.join(comparison.exploratory)}."] if comparison.exploratory else []
    parts += [f"**{line}**" for line in comparison.conclusion]
    parts += ["\n".join(f"- {row.sentence}" for row in comparison.verdicts), table(verdict_cells(comparison))]
    return parts + (["\n".join(f"- {note}" for note in comparison.notes)] if comparison.notes else [])


def table(cells: Cells) -> str:
    """A table; numbers stand to the right."""
    rule = ["---"] * cells.words + ["---:"] * (len(cells.headings) - cells.words)
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in (cells.headings, rule, *cells.rows))
