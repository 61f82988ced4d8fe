"""A program of one's own for the command line: ``esper census outputs``."""

from collections.abc import Sequence
from pathlib import Path

from esper.errors import UserError
from esper.report.summary_file import read_summary


def census(words: Sequence[str]) -> int:
    """Print how many seeds germinated and were kept in every run under a folder; returns the exit code."""
    if len(words) != 1:
        raise UserError("esper census takes one folder, as in: esper census outputs.")
    for path in sorted(Path(words[0]).rglob("summary.json")):
        run = read_summary(path.parent)
        print(f"{run['run']}: {run['seeds']['germinated']} germinated, {run['seeds']['fossilized']} kept")
    return 0
