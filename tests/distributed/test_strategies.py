"""``attach`` in the DDP strategies of Lightning and of accelerate, which transformers' Trainer uses: two real processes grow one model."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from esper.errors import UserError
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


def under_sharding_lightning(rank: int, folder: str) -> Any:
    _be(rank)
    import lightning
    import test_lightning as one
    from lightning.pytorch.strategies import ModelParallelStrategy
    from torch.distributed.fsdp import fully_shard

    class Sharded(one.Classifier):
        def configure_model(self) -> None:
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    def fit(kept: bool) -> Any:
        own, model = one.callback(), Sharded()
        strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
        quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = lightning.Trainer(
            max_steps=12,
            max_epochs=1000,
            accelerator="cpu",
            devices=2,
            strategy=strategy,
            callbacks=[own],
            enable_checkpointing=kept,
            default_root_dir=folder,
            **quiet,
        )
        trainer.fit(model, one.data())
        return own.grow

    with pytest.raises(UserError, match=r"Trainer\(enable_checkpointing=False\)"):
        fit(kept=True)
    grow = fit(kept=False)
    weights = {name: value.tolist() for name, value in grow.export().state_dict().items()}
    return {"weights": weights, "branches": [[name for name, _ in branch.path] for branch in grow.registry.branches.entries]}


def test_two_processes_share_out_a_host_under_lightning(tmp_path: Path) -> None:
    first, second = on_ranks(2, under_sharding_lightning, tmp_path, str(tmp_path))
    assert first == second and first["branches"][0][:4] == ["GERMINATED", "TRAINING", "GRAFTING", "STABILIZATION"]


@pytest.mark.parametrize("strategy", [under_lightning, under_accelerate])
def test_two_processes_grow_one_model(strategy: Any, tmp_path: Path) -> None:
    first, second = on_ranks(2, strategy, tmp_path, str(tmp_path / "kept"))
    assert isinstance(first, dict) and isinstance(second, dict), (first, second)
    assert first["branches"] and first["branches"][0][:4] == ["GERMINATED", "TRAINING", "GRAFTING", "STABILIZATION"]
    assert first == second, "weights, the lives of all branches, the number of steps"
    assert any((tmp_path / "kept").rglob("*")), "checkpoints were written on the way"
