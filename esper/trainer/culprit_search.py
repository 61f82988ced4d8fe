"""Looking for the fewest that did it by switching halves off: what one costs grows with the logarithm of how many there are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

Item = TypeVar("Item")


def fewest(items: Sequence[Item], usual_without: Callable[[Sequence[Item]], bool], off: Sequence[Item] = ()) -> list[Item]:
    """Of ``items`` the fewest without which all is usual, where it is without all of them and not without ``off`` alone.

    ``usual_without(some)`` costs a forward. One among n is found in at most two for each halving of n, several in as many each; where any
    of several would do, that is named which comes first.
    """
    if len(items) <= 1:
        return list(items)
    middle = (len(items) + 1) // 2
    first, second = items[:middle], items[middle:]
    for half in (first, second):
        if usual_without([*off, *half]):
            return fewest(half, usual_without, off)
    of_second = fewest(second, usual_without, [*off, *first])
    return [*fewest(first, usual_without, [*off, *of_second]), *of_second]
