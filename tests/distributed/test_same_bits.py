"""``trainer=ddp``: the same bits on one, two and four processes, with everything that a run has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from esper.cli.compose import compose
from esper.distributed import Ranks
from esper.running.builders import build_trainer
from esper.trainer.device import numerics
from esper.trainer.evaluation import fingerprint
from tests.distributed.launching import on_ranks
from tests.growing import Notebook, germinate

pytestmark = pytest.mark.usefixtures("processes")

BRIEF = ["trainer=ddp", "trainer.batch_size=4", "trainer.validate_every=50%", "telemetry.every=5", "seed=3"]
QUICK = ["lifecycle.readiness=-1.0", "lifecycle.training_min=2step", "lifecycle.stability=0.0"]
TEXT = ["model=transformer", "model.width=16", "model.dropout=0.1", "task=text", f"task.path={__file__}", "task.context=16",
        "task.stretches=10", "task.held_out=0.1"]  # fmt: skip
RUNS: dict[str, list[str]] = {
    "mlp": ["grafting=performance", "trainer.steps=60"],
    "batch_norm": ["model=cnn", "model.norm=batch", "model.channels=[4,6]", "blueprint=conv", "trainer.steps=40", "trainer.ema=0.9"],
    "dropout": [*TEXT, "lifecycle.objective=functional_gradient", "trainer.steps=40", "grafting=drift", "trainer.num_workers=1"],
}


def train(rank: int, words: list[str]) -> dict[str, Any]:
    """A run without folder, bus and trackers, on as many ranks as there are."""
    config = compose(words)
    ranks = Ranks(config.trainer.shards)
    port = Notebook({2: [germinate(site, 0) for site in ("fc1", "fc2", "blocks.0.0")]})
    port.decided = True
    with numerics(config.trainer):
        trainer = build_trainer(config, config.task.build(), torch.device("cpu"), port, ranks=ranks)
        sites = [site.name for site in trainer.grow.registry.sites]
        port.script = {2: [germinate(site, 0) for site in sites[:2]]}
        outcome = trainer.fit()
    return {
        "fingerprint": fingerprint(trainer.grow.export().state_dict(), outcome.history),
        "history": outcome.history,
        "path": [branch.path for branch in trainer.grow.registry.branches.entries],
        "final": outcome.final,
        "macs": dict(trainer.grow.meter.spent),
        "germinated": trainer.grow.transitions.counts["germinated"],
        "rows": [(tick, site, rows.tolist()) for tick, site, rows in port.rows],
    }


@pytest.mark.parametrize("name", list(RUNS))
def test_one_two_and_four_processes_leave_the_same_bits(name: str, tmp_path: Path) -> None:
    words = [*BRIEF, *QUICK, *RUNS[name], f"output={tmp_path}"]
    (alone,) = on_ranks(1, train, tmp_path, words)
    assert alone["germinated"] == 2 and any(stage in ("STABILIZATION", "EVALUATING") for path in alone["path"] for stage, _ in path)
    for count in (2, 4) if name == "mlp" else (4,):
        found = on_ranks(count, train, tmp_path, words)
        for one in found:
            assert one["path"] == alone["path"] and one["macs"] == alone["macs"], count
            assert [item for item, same in zip(one["history"], alone["history"], strict=True) if item != same] == []
            assert one["fingerprint"] == alone["fingerprint"] and one["final"] == alone["final"]
        assert repr(found[0]["rows"]) == repr(alone["rows"])
