"""``esper check [overrides]``: a dry run."""

from __future__ import annotations

from collections.abc import Sequence


def main(arguments: Sequence[str]) -> int:
    """Prints the sites, the stage schedule and the estimates of the run that ``arguments`` describe."""
    from esper.cli.compose import compose

    config = compose(arguments)
    from esper.running.check import check

    print(check(config))
    return 0
