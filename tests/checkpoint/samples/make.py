"""``python -m tests.checkpoint.samples.make``: writes the sample of today's schema version, if there is none yet.

A sample stays as it is for good: what was once saved must load for ever.
"""

from __future__ import annotations

from pathlib import Path

import torch

from esper.checkpoint import disk
from esper.checkpoint.schema import SCHEMA
from esper.engine.saved_state import topology
from esper.running.provenance import provenance
from tests.checkpoint.conftest import build, train_until

HERE = Path(__file__).resolve().parent
STEP = 16
WORDS = (
    "model.width=4",
    "model.depth=1",
    "sites.match=[fc1]",
    "sites.per_site=2",
    "trainer.batch_size=16",
    "blueprint=low_rank",
    "blueprint.rank=2",
    "grafting=drift",
)


def main() -> None:
    """A tiny host at a step at which its branches are being blended in."""
    place = HERE / str(SCHEMA)
    if place.exists():
        raise SystemExit(f"{place} is there already")
    torch.set_num_threads(1)
    trainer = build(*WORDS)
    train_until(trainer, STEP)
    state = {"trainer": trainer.state(), **provenance(trainer.task, torch.device("cpu"))}
    made = disk.write(disk.copy(state, STEP, trainer.grow.tick_number, topology(trainer.grow.registry), None), HERE)
    made.path.rename(place)


if __name__ == "__main__":
    main()
