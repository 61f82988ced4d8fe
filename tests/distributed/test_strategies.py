"""``attach`` in the DDP strategies of Lightning and of accelerate, which transformers' Trainer uses: two real processes grow one model."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.launching import on_ranks

pytestmark = pytest.mark.usefixtures("processes", "heavy_libraries")


def _be(rank: int) -> None:
    """What torchrun would have set in this process."""
    values = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "localhost", "MASTER_PORT": 29500}
    os.environ.update({key: str(value) for key, value in values.items()}, TORCHELASTIC_RUN_ID="tests", ACCELERATE_USE_CPU="true")
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "integrations"))


def _told(grow: Any, model: Any) -> dict[str, Any]:
    branches = grow.registry.branches.entries
    return {
        "weights": {name: value.tolist() for name, value in model.state_dict().items()},
        "branches": [[name for name, _ in branch.path] for branch in branches],
        "steps": grow.steps,
        "saved": sorted(grow.state()),
    }


def under_lightning(rank: int, folder: str) -> dict[str, Any]:
    _be(rank)
    import lightning
    import test_lightning as one
    from lightning.pytorch.callbacks import ModelCheckpoint

    own, model = one.callback(), one.Classifier()
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    keep = ModelCheckpoint(dirpath=folder, every_n_train_steps=10, save_last=True)
    trainer = lightning.Trainer(
        max_steps=20,
        max_epochs=1000,
        accumulate_grad_batches=2,
        callbacks=[own, keep],
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        **quiet,
    )
    trainer.fit(model, one.data())
    return _told(own.grow, model)


def under_accelerate(rank: int, folder: str) -> dict[str, Any]:
    _be(rank)
    import test_transformers as one

    own = one.callback()
    running = one.trainer(Path(folder), own, 24, save_strategy="steps", save_steps=12, ddp_backend="gloo")
    assert running.args.world_size == 2
    running.train()
    return _told(own.grow, running.model)


@pytest.mark.parametrize("strategy", [under_lightning, under_accelerate])
def test_two_processes_grow_one_model(strategy: Any, tmp_path: Path) -> None:
    first, second = on_ranks(2, strategy, tmp_path, str(tmp_path / "kept"))
    assert isinstance(first, dict) and isinstance(second, dict), (first, second)
    assert first["branches"] and first["branches"][0][:4] == ["GERMINATED", "TRAINING", "GRAFTING", "STABILIZATION"]
    assert first == second, "weights, the lives of all branches, the number of steps"
    assert any((tmp_path / "kept").rglob("*")), "checkpoints were written on the way"
