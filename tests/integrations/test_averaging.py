"""Lightning's weight averaging beside a growing module: it follows what grows, and goes on with the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from growing import batch, short
from lightning.pytorch.callbacks import BatchSizeFinder, EMAWeightAveraging, LearningRateFinder, StochasticWeightAveraging
from test_lightning import Classifier, callback
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from esper.engine.extra_passes import host_parameters
from esper.seeds.layer import ATTRIBUTE


def data(size: int = 16) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*batch("mlp", 0, 256)), batch_size=size)


def trainer(callbacks: list[Any], epochs: int, **settings: Any) -> lightning.Trainer:
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False, "enable_model_summary": False}
    return lightning.Trainer(max_epochs=epochs, callbacks=callbacks, accelerator="cpu", **(quiet | settings))


class Validating(Classifier):
    """Looks at held-out data, with the averaged weights where there is an average."""

    def validation_step(self, data: Any, number: int) -> None:
        self.log("validation/loss", nn.functional.cross_entropy(self.net(data[0]), data[1]))


def averages() -> dict[str, Any]:
    return {
        "ema": lambda: EMAWeightAveraging(decay=0.8),
        "swa": lambda: StochasticWeightAveraging(swa_lrs=0.005, swa_epoch_start=1, annealing_epochs=1),
    }


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("kind", ["ema", "swa"])
def test_the_average_follows_what_grows_and_becomes_the_model(kind: str, order: int) -> None:
    lifecycle = short(evaluating_min="60step", evaluating_max="90step")
    own, average, model = callback(lifecycle=lifecycle), averages()[kind](), Validating()
    run = trainer([own, average][::order], 5)
    run.fit(model, data(), data(64) if kind == "ema" else None)
    grown = own.grow
    assert grown is not None and grown.registry.blended(0) and grown.steps == 80
    kept: nn.Module = average._average_model
    inner = kept.module.net if kind == "ema" else kept.net
    for (name, value), (_, other) in zip(host_parameters(model.net).items(), host_parameters(inner).items(), strict=True):
        torch.testing.assert_close(value, other, msg=name)
    x = batch("mlp", 5)[0]
    with torch.no_grad():
        expected = model.net.eval()(x)
        torch.testing.assert_close(inner.eval()(x), expected)
        torch.testing.assert_close(grown.export().eval()(x), expected)
        model.net.fc1._modules[ATTRIBUTE].groups = []
        assert not torch.equal(expected, model.net(x)), "what grew counts"


@pytest.mark.parametrize("kind", ["ema", "swa"])
def test_a_run_that_goes_on_from_a_checkpoint_has_the_same_average(kind: str, tmp_path: Path) -> None:
    lifecycle = short(fine_tuning_min="12step", fine_tuning_max="30step", evaluating_max="30step")

    def run(epochs: int, checkpoint: str | None = None, save: bool = False) -> tuple[Any, Any]:
        own, average, model = callback(lifecycle=lifecycle, total_steps=100), averages()[kind](), Classifier()
        stop = trainer([average, own], 4, limit_train_batches=16)
        if save:
            stop.fit_loop.max_epochs = epochs
            own.on_train_epoch_end = lambda trainer, module: (  # type: ignore[method-assign]
                trainer.save_checkpoint(tmp_path / "half.ckpt") if trainer.current_epoch == 1 else None
            )
        torch.manual_seed(3)
        stop.fit(model, data(), ckpt_path=checkpoint, weights_only=False if checkpoint else None)
        return own.grow, average._average_model

    whole, average = run(4, save=True)
    again, resumed = run(4, checkpoint=str(tmp_path / "half.ckpt"))
    assert again.steps == whole.steps == 64 and again.registry.branches[0].path == whole.registry.branches[0].path
    for one, other in zip(average.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("finder", ["lr", "batch"])
def test_lightnings_finders_run_before_anything_is_attached_or_after(finder: str, tmp_path: Path) -> None:
    class Tunable(Classifier):
        lr = 0.01
        batch_size = 8

        def train_dataloader(self) -> Any:
            return data(self.batch_size)

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), self.lr)

    kinds: dict[str, Any] = {
        "lr": lambda: LearningRateFinder(num_training_steps=12),
        "batch": lambda: BatchSizeFinder(steps_per_trial=2, max_trials=2, init_val=8),
    }
    own, model = callback(), Tunable()
    trainer([kinds[finder](), own], 2, default_root_dir=tmp_path).fit(model)
    assert own.grow is not None and own.grow.registry.branches.entries
    assert own.grow.steps == own.grow.settings.total_ticks
