"""A LightningModule under Lightning's own Trainer."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning
import pytest
import torch
from growing import batch, build, same, sample_loss, short
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from esper import attach
from esper.controllers import CONFIGS
from esper.engine.grow import Grow
from esper.errors import UserError
from esper.integrations.lightning import GrowCallback

TESTING = SimpleNamespace(fn=TrainerFn.TESTING)
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
    reached = [name for name, _ in own.grow.registry.branches[0].path]
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


class Skipping(Classifier):
    """Gives no loss for every third batch, as one does who leaves out bad ones."""

    def __init__(self) -> None:
        super().__init__()
        self.losses: list[float] = []

    def training_step(self, data: Any, number: int, *_: Any) -> Tensor | None:
        self.losses.append(float("nan") if number % 3 == 1 else float(functional.cross_entropy(self.net(data[0]), data[1]).detach()))
        return None if number % 3 == 1 else super().training_step(data, number)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_batches_without_a_loss_are_left_out_of_the_steps_loss(monkeypatch: pytest.MonkeyPatch, accumulate: int) -> None:
    own, model, told = callback(), Skipping(), []
    tick = Grow.tick
    monkeypatch.setattr(Grow, "tick", lambda self, metric=None: told.append(metric) or tick(self, metric))
    quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False, "enable_model_summary": False}
    lightning.Trainer(max_steps=16, accumulate_grad_batches=accumulate, callbacks=[own], accelerator="cpu", **quiet).fit(model, data())
    seen = torch.tensor(model.losses).view(16, accumulate).nanmean(1)
    torch.testing.assert_close(torch.tensor([float("nan") if one is None else float(one) for one in told]), seen, equal_nan=True)
    assert "STABILIZATION" in [name for name, _ in own.grow.registry.branches[0].path]


class Endless(IterableDataset[Any]):
    """Data that does not say how much there is."""

    def __iter__(self) -> Any:
        return zip(*batch("mlp", 0, 64), strict=True)


class Stopped(lightning.Callback):
    """Ends a run that has no length of its own, as a clock would."""

    def on_train_batch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        trainer.should_stop = trainer.global_step >= 8


@pytest.mark.parametrize(("epochs", "source"), [(-1, None), (3, Endless())])
def test_a_run_of_unknown_length_asks_for_total_steps_and_grows_with_it(epochs: int, source: Any) -> None:
    loader = data() if source is None else DataLoader(source, batch_size=16)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False, "enable_model_summary": False}
    given: dict[str, Any] = {"max_epochs": epochs, "accelerator": "cpu", **quiet}
    with pytest.raises(UserError, match=r"cannot tell how many optimizer steps .*GrowCallback\(…, total_steps=…\)\.$"):
        lightning.Trainer(callbacks=[callback()], **given).fit(Classifier(), loader)
    told = callback(total_steps=100)
    lightning.Trainer(callbacks=[told, Stopped()], **given).fit(Classifier(), loader)
    assert told.grow.settings.total_ticks == 100 and told.grow.transitions.counts["germinated"] == 1


def saving(own: GrowCallback, folder: Path, steps: int, *others: Any) -> lightning.Trainer:
    """A trainer that keeps a checkpoint at the last step of every epoch: from others, Lightning goes on with other batches itself."""
    keep = ModelCheckpoint(folder, filename="{step}", save_top_k=-1, every_n_train_steps=8)
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return lightning.Trainer(max_steps=steps, accumulate_grad_batches=2, callbacks=[own, keep, *others], accelerator="cpu", **quiet)


class Interrupted(lightning.Callback):
    """Ends the process's part within the fourth epoch, as a kill would."""

    def on_train_batch_start(self, trainer: lightning.Trainer, module: Any, data: Any, number: int) -> None:
        if trainer.global_step == 26:
            raise Killed


class Killed(BaseException):
    """Nothing of Lightning's catches this one."""


def remembering() -> GrowCallback:
    """A controller that germinates before and after the interruption, so that its memory counts."""
    return callback(controller=CONFIGS["random"](count=3, earliest="5%", latest="80%"), per_site=4)


@pytest.mark.parametrize("at", [8, 24])
def test_a_run_resumed_from_a_checkpoint_ends_with_the_bits_of_the_undisturbed_one(tmp_path: Path, at: int) -> None:
    whole, alone = remembering(), Classifier()
    saving(whole, tmp_path / "whole", 48).fit(alone, data())
    with pytest.raises(Killed):
        saving(remembering(), tmp_path / "run", 48, Interrupted()).fit(Classifier(), data())
    again, model = remembering(), Classifier()
    saving(again, tmp_path / "run", 48).fit(model, data(), ckpt_path=str(tmp_path / "run" / f"step={at}.ckpt"))
    assert again.grow.steps == again.grow.tick_number == 48
    assert any(ticks[0][1] > at for ticks in (branch.path for branch in whole.grow.registry.branches.entries))
    same(alone.state_dict(), model.state_dict())
    assert again.grow.observer.branch_cards() == whole.grow.observer.branch_cards()
    same(whole.grow.export().state_dict(), again.grow.export().state_dict())


def test_a_checkpoint_holds_the_host_under_its_names_and_is_tested_with_what_had_grown_then(tmp_path: Path) -> None:
    own, model = callback(), Judged()
    running = saving(own, tmp_path, 24)
    running.fit(model, data())
    saved = torch.load(tmp_path / "step=8.ckpt", weights_only=True)
    assert set(saved["state_dict"]) == set(Classifier().state_dict())
    Classifier().load_state_dict(saved["state_dict"])
    running.test(model, data(), ckpt_path=str(tmp_path / "step=8.ckpt"), verbose=False)
    assert own.grow.steps == 8 and own.grow.registry.blended(0)
    host = Classifier()
    host.load_state_dict(saved["state_dict"])
    other = attach(host.net, loss=sample_loss, total_steps=24, state=saved["esper"], **own.settings)
    same(other.export().state_dict(), own.grow.export().state_dict())


class Judged(Classifier):
    """One that can be tested."""

    def test_step(self, data: Any, number: int) -> None:
        self.log("test/loss", functional.cross_entropy(self.net(data[0]), data[1]))


def test_a_checkpoint_in_which_nothing_could_have_grown_is_refused(tmp_path: Path) -> None:
    first = trainer([], 4)
    first.fit(Classifier(), data())
    first.save_checkpoint(tmp_path / "four.ckpt")
    with pytest.raises(UserError, match="saved without a GrowCallback"):
        trainer([callback()], 20).fit(Classifier(), data(), ckpt_path=str(tmp_path / "four.ckpt"))


class Exploit:
    """Runs a command when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


def hostile_files(folder: Path, mark: Path) -> dict[str, Path]:
    """Files that would run a command where they were unpickled without care, and some that are nothing."""
    torch.save({"esper": Exploit(mark), "state_dict": {}}, folder / "zip.ckpt")
    torch.save({"esper": Exploit(mark)}, folder / "old.ckpt", _use_new_zipfile_serialization=False)
    for protocol in (0, 2, 4):
        (folder / f"{protocol}.ckpt").write_bytes(pickle.dumps({"esper": Exploit(mark)}, protocol))
    (folder / "empty.ckpt").write_bytes(b"")
    (folder / "torn.ckpt").write_bytes((folder / "zip.ckpt").read_bytes()[:-100])
    return {path.stem: path for path in folder.glob("*.ckpt")}


def test_a_hostile_checkpoint_executes_nothing_and_is_refused_in_a_sentence(tmp_path: Path) -> None:
    mark, own, model = tmp_path / "executed", callback(), Judged()
    running = saving(own, tmp_path / "run", 16)
    running.fit(model, data())
    assert own.grow is not None
    before = own.grow.observer.branch_cards()
    files = hostile_files(tmp_path, mark)
    assert len(files) == 7
    for path in files.values():
        with pytest.raises(UserError, match=f"^{path} cannot be read as tensors and plain values, so nothing in it was used; take") as said:
            own.on_test_start(SimpleNamespace(state=TESTING, ckpt_path=str(path)), model)  # type: ignore[arg-type]
        assert "\n" not in str(said.value)
        with pytest.raises((pickle.UnpicklingError, EOFError, RuntimeError)):  # Lightning reads it before, in its own way
            running.test(model, data(), ckpt_path=str(path), verbose=False)
    assert not mark.exists() and own.grow.observer.branch_cards() == before


def test_a_checkpoint_without_what_grew_is_refused_for_testing_too(tmp_path: Path) -> None:
    own, model = callback(), Judged()
    saving(own, tmp_path, 16).fit(model, data())
    torch.save({"state_dict": {}}, tmp_path / "none.ckpt")
    with pytest.raises(UserError, match="saved without a GrowCallback"):
        own.on_test_start(SimpleNamespace(state=TESTING, ckpt_path=str(tmp_path / "none.ckpt")), model)  # type: ignore[arg-type]


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
