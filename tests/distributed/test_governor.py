"""The governor in several processes: what goes wrong on one rank is rolled back on all, as in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from esper.cli.compose import compose
from esper.distributed import Ranks
from esper.distributed.sharding import make_whole
from esper.lifecycle import Stage
from esper.running.builders import build_trainer
from esper.trainer.device import numerics
from tests.distributed.launching import on_ranks
from tests.distributed.test_same_bits import QUICK
from tests.growing import Notebook, germinate

pytestmark = pytest.mark.usefixtures("processes")

WORDS = [
    "trainer=ddp",
    "trainer.batch_size=4",
    "trainer.steps=60",
    "telemetry.every=5",
    "grafting.ramp=30step",
    "lifecycle.grafting_max=90%",
]


def train(rank: int, words: list[str]) -> dict[str, Any]:
    """Data that are not finite in the last micro-batch of step 30, and a branch that explodes before step 34."""
    config = compose(words)
    port = Notebook({2: [germinate("fc1", 0), germinate("fc1", 1)]})
    with numerics(config.trainer):
        trainer = build_trainer(config, config.task.build(), torch.device("cpu"), port, ranks=Ranks(config.trainer.shards))
        whole = trainer.batches.at

        def spoiled(number: int) -> Any:
            batch = whole(number)
            return (batch[0] * float("nan"), *batch[1:]) if number == 30 * 4 + 3 else batch

        trainer.batches.at = spoiled  # type: ignore[method-assign]
        trainer.model.train()
        for step in range(40):
            if step == 34:
                branch = trainer.grow.registry.in_stage(Stage.GRAFTING)[0]
                with torch.no_grad():
                    trainer.grow.registry.layers[branch.site].bank(branch.blueprint).stacks["b2"][branch.slot] = 1e30
            trainer.advance()
    assert trainer.governor is not None
    make_whole(trainer.model)
    return {
        "anomalies": [str(anomaly) for anomaly in trainer.governor.anomalies],
        "weights": {name: value.tolist() for name, value in trainer.model.state_dict().items()},
        "path": [branch.path for branch in trainer.grow.registry.branches.entries],
    }


def test_what_goes_wrong_on_one_rank_is_rolled_back_on_all_to_the_same_bits(tmp_path: Path) -> None:
    words = [*WORDS, *QUICK, f"output={tmp_path}"]
    (alone,) = on_ranks(1, train, tmp_path, words)
    assert len(alone["anomalies"]) == 2 and alone["anomalies"][0] == "step 30: the loss is nan"
    assert "caused by branch 0" in alone["anomalies"][1] and "ROLLED_BACK" in dict(alone["path"][0])
    assert on_ranks(2, train, tmp_path, words) == [alone, alone]
    for found in on_ranks(2, train, tmp_path, ["trainer=fsdp", *words[1:]]):  # no process of which has whole weights
        assert found["anomalies"][0] == alone["anomalies"][0] and found["path"] == alone["path"]
        assert "caused by branch 0" in found["anomalies"][1]
        for name, values in alone["weights"].items():
            torch.testing.assert_close(torch.tensor(found["weights"][name]), torch.tensor(values), atol=1e-4, rtol=0.0)
