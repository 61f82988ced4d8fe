"""Which of torchrun's processes this one is, as its environment says. Imports no torch."""

from __future__ import annotations

import os

from esper.errors import UserError

NAMES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def world() -> tuple[int, int]:
    """This process's rank and the number of processes; 0 and 1 where nothing has started several."""
    if any(name not in os.environ for name in NAMES):
        return 0, 1
    try:
        return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    except ValueError:
        raise UserError(
            f"RANK={os.environ['RANK']} and WORLD_SIZE={os.environ['WORLD_SIZE']} are not accepted: torchrun sets both to whole numbers."
        ) from None


def follows() -> bool:
    """Whether this process trains what rank 0 tells it."""
    return world()[0] > 0
