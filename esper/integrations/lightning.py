"""A model that grows under Lightning's ``Trainer``: ``Trainer(callbacks=[GrowCallback(loss=…, judge=…)])``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn

from esper.errors import UserError
from esper.training import Grow, attach

SEEDS = ".seed_layer."


class GrowCallback(Callback):
    """Attaches when fitting begins, and grows the module in automatic optimization with one optimizer.

    Args:
        loss: ``loss(module, batch)``, without logging: it is also called by the judge and for shadow forwards.
        module: name of the submodule that grows and that ``loss`` gets; empty for the LightningModule itself.
        settings: everything else that ``esper.attach`` takes; ``controller`` is ``heuristic`` unless given.
    """

    def __init__(self, loss: Callable[[nn.Module, Any], Any], module: str = "", **settings: Any) -> None:
        self.loss, self.module, self.settings = loss, module, {"controller": "heuristic", **settings}
        self.grow: Grow | None = None
        self._batch: Any = None
        self._state: Any = None
        self._step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach: the optimizer is there, and the model is on its device."""
        if not pl_module.automatic_optimization or len(trainer.optimizers) != 1:
            raise UserError("GrowCallback serves automatic optimization with one optimizer; in a loop of your own, call esper.attach.")
        model = pl_module.get_submodule(self.module)
        given = {"total_steps": int(trainer.estimated_stepping_batches), "accumulate": trainer.accumulate_grad_batches} | self.settings
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        self.grow = attach(model, loss=self.loss, optimizer=trainer.optimizers[0], scaler=scaler, state=self._state, **given)
        self._step = trainer.global_step
        pl_module.register_load_state_dict_post_hook(_forgive_seeds)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Remember the batch, which is on its device here."""
        self._batch = batch

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A micro-batch is done."""
        if self.grow is not None:
            self.grow.after_backward(self._batch)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """A tick, where this batch ended an optimizer step; its gradients are still there."""
        if self.grow is not None and trainer.global_step > self._step:
            self._step = trainer.global_step
            self.grow.tick(outputs["loss"].detach() * trainer.accumulate_grad_batches)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say that the run is over; ``callback.grow.export()`` gives the plain module."""
        if self.grow is not None:
            self.grow.close()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep the host's tensors under their own names, and what grew beside them."""
        if self.grow is not None:
            kept = {name: value for name, value in checkpoint["state_dict"].items() if SEEDS not in f".{name}"}
            checkpoint["state_dict"], checkpoint["esper"] = kept, self.grow.state()

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take what had grown up again when fitting begins."""
        if "esper" not in checkpoint:
            raise UserError("This checkpoint was saved without a GrowCallback and holds nothing that grew; begin anew with its weights.")
        self._state = checkpoint["esper"]

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """After ``fit``, what is tested with ``ckpt_path`` is what had grown by then, as the host is."""
        if self.grow is not None and trainer.state.fn != TrainerFn.FITTING and trainer.ckpt_path:
            self.grow.load_branches(torch.load(trainer.ckpt_path, map_location="cpu", weights_only=True)["esper"])

    on_validation_start = on_predict_start = on_test_start


def _forgive_seeds(module: nn.Module, keys: Any) -> None:
    """A checkpoint's state has the host's tensors alone: those of the seeds come apart from them."""
    keys.missing_keys[:] = [name for name in keys.missing_keys if SEEDS not in f".{name}"]
