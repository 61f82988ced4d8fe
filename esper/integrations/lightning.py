"""A model that grows under Lightning's ``Trainer``: ``Trainer(callbacks=[GrowCallback(loss=…, judge=…)])``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from esper import Grow, attach
from esper.engine.saved_state import expect_host_alone
from esper.errors import UserError
from esper.integrations.checkpoints import LIGHTNING, grown_in, keep_in, not_sharded, plain


class GrowCallback(Callback):
    """Attaches when fitting begins, and grows the module in automatic optimization with one optimizer.

    ``loss(module, batch)`` does no logging: the judge and shadow forwards call it too. ``module`` names the submodule that grows, which
    ``loss`` gets (empty: the LightningModule). ``settings`` go to ``esper.attach``; ``total_steps`` is Lightning's estimate by default.
    """

    def __init__(self, loss: Callable[[torch.nn.Module, Any], Any], module: str = "", **settings: Any) -> None:
        self.loss, self.module, self.settings = loss, module, {"controller": "heuristic", **settings}
        self.grow: Grow | None = None
        self._state: Any = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach: the optimizer is there, and the model is on its device."""
        if not pl_module.automatic_optimization or len(trainer.optimizers) != 1:
            raise UserError("GrowCallback serves automatic optimization with one optimizer; in a loop of your own, call esper.attach.")
        given: dict[str, Any] = {"accumulate": trainer.accumulate_grad_batches, "scaler": getattr(trainer.precision_plugin, "scaler", None)}
        if "total_steps" not in self.settings:
            given["total_steps"] = steps = trainer.estimated_stepping_batches
            if not 0 < steps < float("inf"):
                raise UserError("Lightning cannot tell how many optimizer steps this run has: say so, GrowCallback(…, total_steps=…).")
        model = not_sharded(pl_module.get_submodule(self.module), LIGHTNING if trainer.checkpoint_callbacks else "")
        self.grow = attach(model, loss=self.loss, optimizer=trainer.optimizers[0], state=self._state, **(given | self.settings))
        for average in filter(None, (getattr(one, "_average_model", None) for one in trainer.callbacks)):  # type: ignore[attr-defined]
            self.grow.follow(average)
        self._step, self._losses = trainer.global_step, list[torch.Tensor]()
        expect_host_alone(pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Remember the batch, which is on its device here."""
        self._batch = batch

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A micro-batch is done."""
        self.grow.after_backward(self._batch)  # type: ignore[union-attr]

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """A tick, where this batch ended an optimizer step; its gradients are still there. A skipped batch gave no loss."""
        self._losses += [outputs["loss"] * trainer.accumulate_grad_batches] if outputs else []
        if trainer.global_step > self._step:
            self._step, losses, self._losses = trainer.global_step, self._losses, []
            self.grow.tick(torch.stack(losses).mean() if losses else None)  # type: ignore[union-attr]

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End the run; ``callback.grow.export()`` gives the plain module."""
        self.grow.close()  # type: ignore[union-attr]

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep the host's tensors under their own names, and the branches beside them."""
        keep_in(checkpoint, self.grow)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Restore the branches when fitting begins; at once after a finder's trial, which went past this callback."""
        self._state = grown_in(checkpoint)
        if self.grow is not None and trainer.state.fn == TrainerFn.FITTING:
            self.grow.load_branches(self._state)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """After ``fit``, a test with ``ckpt_path`` uses the branches of that checkpoint, as it uses its host."""
        if self.grow is not None and trainer.state.fn != TrainerFn.FITTING and trainer.ckpt_path:
            self.grow.load_branches(grown_in(plain(trainer.ckpt_path)))

    on_validation_start = on_predict_start = on_test_start
