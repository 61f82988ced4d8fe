"""The report of a comparison: tables in the terminal, and the files of the results."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.cells import cell_len
from rich.markup import escape
from rich.text import Text

from esper.compare.results.comparison import Comparison, write_json
from esper.compare.results.comparison import format_values as listed
from esper.compare.results.plan import Plan
from esper.compare.results.sentences import task_and_model
from esper.compare.results.tables import Cells, arm_cells, cost_cells, number, overall_cells, verdict_cells

if TYPE_CHECKING:
    import pandas as pd
    from rich.console import Console
    from rich.table import Table

WIDTH = 100  # of comparison.txt: MLflow's page shows about so much of a line
AROUND, EDGE = 3, 1  # the frame's part of a column, and its left edge
LEAST = 6  # a name is not broken into pieces smaller than this


def write_results(comparison: Comparison, plan: Plan, folder: Path, figures: bool, curves: pd.DataFrame | None = None) -> list[Path]:
    """``comparison.json``, ``.txt``, ``.md``, ``.tex``, ``.html`` and the figures in ``folder``.

    ``curves`` has the histories that the page draws: columns arm, block, run, step and value.
    """
    files = [write_json(comparison, plan, folder / "comparison.json")]
    from rich.console import Console

    from esper.compare.results.latex import latex
    from esper.compare.results.markdown import markdown
    from esper.compare.results.page import page

    table = folder / "comparison.txt"
    with table.open("w", encoding="utf-8") as out:
        show(comparison, plan, Console(file=out, width=WIDTH, force_jupyter=False))
    files.append(table)
    for ending, text in ((".md", markdown(comparison, plan)), (".tex", latex(comparison, plan)), (".html", page(comparison, plan, curves))):
        files.append(folder / f"comparison{ending}")
        files[-1].write_text(text, encoding="utf-8")
    if figures:
        from esper.compare.results.figures import draw

        files += draw(comparison, plan, folder / "figures")
    return files


def show(comparison: Comparison, plan: Plan, console: Console) -> None:
    """Print arms, verdicts, notes and the sentences."""
    if comparison.exploratory:
        console.print(f"[bold red]exploratory[/]: {'; '.join(comparison.exploratory)}", highlight=False)
    for table in _tables(comparison, plan):
        console.print(fit_width(table, console.width))
    for line in [*comparison.notes, *(row.sentence for row in comparison.verdicts)]:
        console.print(f"• {line}", highlight=False, markup=False)
    for line in comparison.conclusion:
        console.print(line, style="bold", highlight=False, markup=False)


def _tables(comparison: Comparison, plan: Plan) -> Iterator[Table]:
    yield arm_table(comparison, plan)
    if (costs := cost_cells(comparison)).rows:
        yield _of_cells("cost and growth of a run", costs)
    if comparison.overall:
        yield _of_cells("all runs of all blocks (a description, no verdict)", overall_cells(comparison))
    if comparison.tuned:
        yield tuning_table(comparison, plan)
    yield verdict_table(comparison, plan)
    if comparison.ranking:
        yield ranking_table(comparison, plan)


def arm_table(comparison: Comparison, plan: Plan) -> Table:
    """Quality and failures of every arm, and the means of its controls where its runs trained them."""
    place = task_and_model(plan.blocks[0], plan) if len(plan.blocks) == 1 else ""
    return _of_cells(f"{plan.metric}, {plan.direction}{place}; reference {plan.reference}", arm_cells(comparison), {"failed": _red})


def _red(count: str) -> str:
    return count if count == "0" else f"[red]{count}[/]"


def _of_cells(heading: str, cells: Cells, styles: Mapping[str, Callable[[str], str]] | None = None) -> Table:
    """A table of plain cells; ``styles`` marks the cells of a column."""
    from rich.table import Table

    table = Table(title=heading, title_justify="left")
    for at, name in enumerate(cells.headings):
        table.add_column(name, justify="left" if at < cells.words else "right", overflow="fold")
    marks = [(styles or {}).get(name, str) for name in cells.headings]
    for row in cells.rows:
        table.add_row(*(mark(escape(cell)) for mark, cell in zip(marks, row, strict=True)))
    return table


def tuning_table(comparison: Comparison, plan: Plan) -> Table:
    """The values that every arm chose in tuning, and the cost of the choice."""
    table = _table("tuned on validation, with seeds of their own", comparison)
    for name in ("chosen", plan.metric, "runs", "failed", "MACs"):
        table.add_column(name, justify="left" if name == "chosen" else "right", overflow="fold")
    for one in comparison.tuned:
        failed = f"[red]{one.failed}[/]" if one.failed else "0"
        chosen = [escape(listed(one.values)), number(one.mean), str(one.runs), failed, number(one.macs)]
        table.add_row(*_where(one.block, comparison), escape(one.arm), *chosen)
    return table


def _table(title: str, comparison: Comparison) -> Table:
    """A table that begins with the block, where there are any, and the arm."""
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for name in [*(["block"] if _where("", comparison) else []), "arm"]:
        table.add_column(name, overflow="fold")
    return table


def _where(block: str, comparison: Comparison) -> list[str]:
    return [escape(block)] if any(arm.block for arm in comparison.arms) else []


def verdict_table(comparison: Comparison, plan: Plan) -> Table:
    """One row a comparison with the reference; p-values and the interval's level are Holm's."""
    colours = {"better": "green", "worse": "red", "equivalent": "cyan", "inconclusive": "dim"}
    heading = f"against the reference {plan.others}, p and intervals after Holm"
    return _of_cells(heading, verdict_cells(comparison), {"verdict": lambda word: f"[{colours[word]}]{word}[/]"})


def ranking_table(comparison: Comparison, plan: Plan) -> Table:
    """Arms from best to worst by mean over the blocks, each with the arms that it is surely better than."""
    from rich.table import Table

    means = {arm: plan.sign * sum(a.mean for a in comparison.arms if a.arm == arm) / len(plan.blocks) for arm in plan.arms}
    beaten: dict[str, list[str]] = {arm: [] for arm in plan.arms}
    for row in comparison.ranking:
        if row.verdict == "B better":
            beaten[row.arm].append(row.reference)
        elif row.verdict == "A better":
            beaten[row.reference].append(row.arm)
    table = Table(title="all against all, after Holm", title_justify="left")
    for name in ("arm", "mean", "surely better than"):
        table.add_column(name, overflow="ellipsis" if name == "mean" else "fold")
    for arm in sorted(means, key=lambda a: -means[a] if math.isfinite(means[a]) else math.inf):
        table.add_row(escape(arm), f"{plan.sign * means[arm]:.4g}", escape(", ".join(beaten[arm])) or "–")
    return table


def fit_width(table: Table, width: int) -> Table:
    """Give every column its width where the table is wider than ``width``.

    All columns are as narrow as their longest word, the first of them as wide as the remaining space allows; only where the
    words themselves are too wide, those of the widest column that may fold are broken.
    """
    cells = [[str(column.header), *map(str, column.cells)] for column in table.columns]
    whole, words = ([_longest(texts, apart) for texts in cells] for apart in (False, True))
    room = width - EDGE - AROUND * len(cells)
    if sum(whole) <= room:
        return table
    left = room - sum(words)
    for at, column in enumerate(table.columns):
        more = min(max(left, 0), whole[at] - words[at])
        words[at], left = words[at] + more, left - more
        column.no_wrap = False
    foldable = [at for at, column in enumerate(table.columns) if column.overflow == "fold" and column.justify == "left"]
    while left < 0 and foldable:
        widest = max(foldable, key=lambda at: words[at])
        if words[widest] <= LEAST:
            break
        words[widest], left = words[widest] - 1, left + 1
    for column, wide in zip(table.columns, words, strict=True):
        column.width = wide
    return table


def _longest(texts: Sequence[str], words: bool) -> int:
    """The widest of the texts, or of the words in them."""
    plain = [Text.from_markup(text).plain for text in texts]
    return max(cell_len(part) for text in plain for part in (text.split() if words else [text]) or [""])
