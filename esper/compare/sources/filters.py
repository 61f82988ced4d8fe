"""``filter='params.model = "cnn" and metrics.epochs >= 10'``: the part of MLflow's own filters that every source can answer."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from esper.compare.sources.table import canonical
from esper.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

    from esper.compare.sources.table import RunsTable

ORDER: dict[str, Callable[[float, float], bool]] = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}
CONDITION = re.compile(
    r"""\s*(?:`(?P<quoted>[^`]+)`|(?P<bare>[^\s=<>!'"]+))  # the column, in backticks where it has blanks
        \s*(?P<sign>!=|<=|>=|=|<|>)\s*
        (?:'(?P<single>[^']*)'|"(?P<double>[^"]*)"|(?P<word>[^\s'"]+))\s*""",
    re.VERBOSE,
)


@dataclass(frozen=True)
class Condition:
    """A column, a sign and a value."""

    column: str
    sign: str
    value: str

    def holds(self, value: Any) -> bool:
        """Whether it holds for one run; nothing holds for a value that is missing."""
        mine, asked = canonical(value), canonical(self.value)
        if mine is None:
            return False
        if self.sign in ("=", "!="):
            return (mine == asked) == (self.sign == "=")
        try:
            return ORDER[self.sign](float(mine), float(self.value))
        except ValueError:
            return False


def parse_filter(text: str) -> list[Condition]:
    """The conditions of a filter, all of which must hold; none for no text.

    Raises:
        UserError: a text that is no such list.
    """
    found: list[Condition] = []
    at = 0
    while text.strip() and at < len(text):
        match = CONDITION.match(text, at)
        rest = text[match.end() :] if match else ""
        joined = re.match(r"and\s", rest, re.IGNORECASE)
        if not match or (rest and not joined):
            raise UserError(
                f"filter={text} cannot be read: give conditions such as params.model = 'cnn' and metrics.epoch >= 10, joined by and."
            )
        value = next(part for part in (match["single"], match["double"], match["word"]) if part is not None)
        found.append(Condition(match["quoted"] or match["bare"], match["sign"], value))
        at = match.end() + (joined.end() if joined else 0)
    return found


def filtered(table: RunsTable, conditions: list[Condition]) -> pd.DataFrame:
    """The rows in which every condition holds.

    Raises:
        UserError: a condition on a column that the runs do not have.
    """
    frame = table.frame
    for one in conditions:
        column = table.column(one.column, "filter")
        frame = frame[[one.holds(value) for value in frame[column]]]
    return frame
