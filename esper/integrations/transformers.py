"""A model that grows under transformers' ``Trainer``: ``Trainer(…, callbacks=[GrowCallback(judge=…)])``."""

from __future__ import annotations

from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from esper.errors import UserError
from esper.training import Grow, attach


class GrowCallback(TrainerCallback):  # type: ignore[misc]
    """Attaches when training begins; the model's own loss (``model(**batch).loss``) is used unless ``loss`` is given.

    ``settings`` is what ``esper.attach`` takes; ``judge`` is needed for anything to be kept, ``controller`` is ``heuristic``
    and ``sites`` the hidden layers of the perceptrons unless given.
    """

    def __init__(self, **settings: Any) -> None:
        self.settings = {"controller": "heuristic", "sites": "mlp_hidden", **settings}
        self.grow: Grow | None = None
        self._batch: Any = None
        self._losses: list[torch.Tensor] = []
        self._hooks: list[Any] = []

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any) -> None:
        """Attach: model and optimizer are prepared."""
        if state.global_step:
            raise UserError(
                "GrowCallback cannot go on from a checkpoint of transformers' Trainer, which holds nothing that grew; start anew."
            )
        optimizer = getattr(parts["optimizer"], "optimizer", parts["optimizer"])
        given = {"total_steps": state.max_steps, "accumulate": args.gradient_accumulation_steps, "seed": args.seed} | self.settings
        self.grow = attach(parts["model"], optimizer=optimizer, **given)
        self._hooks = [parts["model"].register_forward_hook(self._remember, with_kwargs=True)]

    def _remember(self, model: torch.nn.Module, inputs: Any, named: dict[str, Any], output: Any) -> None:
        if model.training and torch.is_grad_enabled() and self._batch is None:
            self._batch = {name: value for name, value in named.items() if name != "num_items_in_batch"}
            share = 1.0 if named.get("num_items_in_batch") is not None else 1.0 / self.grow.settings.accumulate  # type: ignore[union-attr]
            self._losses.append(output["loss"].detach() * share)  # with num_items_in_batch: the micro-batch's part of the step's mean

    def _learn(self) -> None:
        if self.grow is not None and self._batch is not None:
            self.grow.after_backward(self._batch)

    def on_substep_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any) -> None:
        """A micro-batch that ends no step is done."""
        self._learn()
        self._batch = None

    def on_pre_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any) -> None:
        """The last micro-batch of a step is done."""
        self._learn()

    def on_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any) -> None:
        """A tick: the optimizer has stepped and the gradients are still there."""
        if self.grow is not None:
            self.grow.tick(torch.stack(self._losses).sum() if self._losses else None)
        self._batch, self._losses = None, []

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any) -> None:
        """What was measured on held-out data, for controllers and strategies."""
        values = {
            f"validation/{name.removeprefix('eval_')}": float(value)
            for name, value in parts.get("metrics", {}).items()
            if isinstance(value, float)
        }
        if self.grow is not None:
            self.grow.observe(values, "validation/loss" if "validation/loss" in values else None, maximize=False)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any) -> None:
        """Say that the run is over; ``callback.grow.export()`` gives the plain model."""
        for hook in self._hooks:
            hook.remove()
        if self.grow is not None:
            self.grow.close()
