"""A LightningModule under Lightning's own Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from growing import batch, build, sample_loss, short
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from esper.controllers import CONFIGS
from esper.errors import UserError
from esper.integrations.lightning import GrowCallback

SCRIPT = [{"at": "2step", "command": "germinate", "site": "fc1", "count": 1}]


class Classifier(lightning.LightningModule):
    """The net of ``growing`` as Lightning's users wrap theirs."""

    def __init__(self, optimizers: int = 1) -> None:
        super().__init__()
        self.net = build("mlp")
        self.optimizer_count = optimizers

    def training_step(self, data: Any, number: int, *_: Any) -> Tensor:
        loss = functional.cross_entropy(self.net(data[0]), data[1])
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return [torch.optim.AdamW(self.parameters(), 0.01) for _ in range(self.optimizer_count)]


def data() -> DataLoader[Any]:
    return DataLoader(TensorDataset(*batch("mlp", 0, 256)), batch_size=16)


def callback(**changes: Any) -> GrowCallback:
    settings: dict[str, Any] = {
        "judge": [batch("mlp", 900, 64)],
        "lifecycle": short(),
        "per_site": 2,
        "controller": CONFIGS["scheduled"](script=SCRIPT),
    }
    return GrowCallback(sample_loss, module="net", **(settings | changes))


def trainer(own: list[GrowCallback], steps: int) -> lightning.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False, "enable_model_summary": False}
    return lightning.Trainer(max_steps=steps, max_epochs=1000, accumulate_grad_batches=2, callbacks=own, accelerator="cpu", **quiet)  # type: ignore[arg-type]


def test_a_seed_lives_through_its_stages_and_exports() -> None:
    own, model = callback(), Classifier()
    trainer([own], 20).fit(model, data())
    assert own.grow is not None and own.grow.steps == 20
    reached = [name for name, _ in own.grow.garden.branches[0].path]
    assert reached[:4] == ["GERMINATED", "TRAINING", "GRAFTING", "STABILIZATION"]
    x = batch("mlp", 5)[0]
    with torch.no_grad():
        torch.testing.assert_close(own.grow.export().eval()(x), model.net.eval()(x))


def test_a_dormant_callback_leaves_training_bit_for_bit() -> None:
    own, grown, alone = callback(controller="none"), Classifier(), Classifier()
    trainer([own], 12).fit(grown, data())
    trainer([], 12).fit(alone, data())
    for (name, value), (_, other) in zip(own.grow.export().state_dict().items(), alone.net.state_dict().items(), strict=True):
        assert torch.equal(value, other), name


def test_a_checkpoint_holds_the_host_under_its_names_and_what_grew_goes_on(tmp_path: Path) -> None:
    own, model = callback(), Classifier()
    first = trainer([own], 10)
    first.fit(model, data())
    first.save_checkpoint(tmp_path / "ten.ckpt")
    saved = torch.load(tmp_path / "ten.ckpt", weights_only=True)
    assert set(saved["state_dict"]) == set(Classifier().state_dict())
    again = callback()
    trainer([again], 16).fit(Classifier(), data(), ckpt_path=str(tmp_path / "ten.ckpt"))
    assert again.grow.steps == 16
    assert [name for name, _ in again.grow.garden.branches[0].path][:3] == ["GERMINATED", "TRAINING", "GRAFTING"]


def test_two_optimizers_are_refused() -> None:
    class Manual(Classifier):
        def __init__(self) -> None:
            super().__init__(2)
            self.automatic_optimization = False

    with pytest.raises(UserError, match=r"one optimizer; in a loop of your own, call esper.attach"):
        quiet = lightning.Trainer(
            max_steps=2,
            logger=False,
            enable_progress_bar=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            callbacks=[callback()],
            accelerator="cpu",
        )
        quiet.fit(Manual(), data())
