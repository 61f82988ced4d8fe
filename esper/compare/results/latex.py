"""The verdicts as a LaTeX table, for the package booktabs."""

from __future__ import annotations

from esper.compare.results.comparison import Comparison
from esper.compare.results.plan import Plan
from esper.compare.results.tables import title, verdict_cells

ESCAPED = {
    "\\": r"\textbackslash{}",
    **{letter: f"\\{letter}" for letter in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "…": r"to",
    "–": "--",
    "α": r"$\alpha$",
    "×": r"$\times$",
    "δ": r"$\delta$",
}


def escape(text: str) -> str:
    """Text that LaTeX prints as it is."""
    return "".join(ESCAPED.get(letter, letter) for letter in text)


def latex(comparison: Comparison, plan: Plan) -> str:
    """A ``table`` with the verdicts; the caption says what was tested, and that the analysis was exploratory where it was."""
    cells = verdict_cells(comparison)
    columns = "l" * cells.words + "r" * (len(cells.headings) - cells.words)
    rows = [" & ".join(escape(cell) for cell in row) + r" \\" for row in cells.rows]
    test = "paired sign-flip tests" if plan.paired else "permutation tests of groups"
    caption = (
        f"{title(plan)}; {test}, p-values and intervals after Holm at α = {plan.alpha:g}, margin of equivalence {plan.minimum_effect:g}"
    )
    if comparison.exploratory:
        caption += f". Exploratory: {'; '.join(comparison.exploratory)}"
    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{escape(caption)}.}}",
        rf"\begin{{tabular}}{{{columns}}}",
        r"\toprule",
        " & ".join(escape(heading) for heading in cells.headings) + r" \\",
        r"\midrule",
        *rows,
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"
