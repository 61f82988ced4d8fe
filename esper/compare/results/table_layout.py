"""Tables that fit a narrow terminal: their cells break between words, names of arms stay whole as long as they can."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.cells import cell_len
from rich.text import Text

if TYPE_CHECKING:
    from rich.table import Table

AROUND, EDGE = 3, 1  # the frame's part of a column, and its left edge
LEAST = 6  # a name is not broken into pieces smaller than this


def fit(table: Table, width: int) -> Table:
    """Give every column its width where the table is wider than ``width``.

    All columns are as narrow as their longest word, the first of them as wide as what is left allows; only where the
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
    foldable = [at for at, column in enumerate(table.columns) if column.overflow == "fold"]
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
