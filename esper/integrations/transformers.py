"""A model that grows under transformers' ``Trainer``: ``Trainer(…, callbacks=[GrowCallback(judge=…)])``."""

from __future__ import annotations

import inspect
import secrets
from pathlib import Path
from typing import Any, cast

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from esper import Grow, attach
from esper.engine.extra_passes import to_device
from esper.engine.learning.losses import told_without
from esper.engine.saved_state import HostAlone
from esper.integrations.checkpoints import TRANSFORMERS, found, grown_in, not_sharded


class GrowCallback(TrainerCallback):
    """Attaches when training begins; the Trainer's own loss (its ``compute_loss``) is used unless ``loss`` is given.

    ``settings`` go to ``esper.attach``; nothing is kept without ``judge``. ``resume_from`` names a checkpoint's folder that was moved.
    """

    def __init__(self, resume_from: str | Path = "", **settings: Any) -> None:
        self.settings = {"controller": "heuristic", "sites": "mlp_hidden", **settings}
        self.grow: Grow | None = None
        self._moved_to, self._run = Path(resume_from), f"esper-{secrets.token_hex(8)}"

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any) -> None:
        """Attach: model and optimizer are prepared, and restored where there is a checkpoint."""
        # The Trainer gives its callbacks everything but itself; it is among the callers.
        trainer = next(one for call in inspect.stack(0) if isinstance(one := call.frame.f_locals.get("self"), Trainer))
        optimizer, output, steps = parts["optimizer"], Path(args.output_dir or ""), args.gradient_accumulation_steps
        given: dict[str, Any] = {"loss": told_without(trainer.compute_loss), "accumulate": steps, "total_steps": state.max_steps}
        given |= {"model": not_sharded(parts["model"], TRANSFORMERS), "seed": args.seed, "scaler": getattr(optimizer, "scaler", None)}
        given |= {"state": _beside(state, output, self._moved_to)} if state.global_step else {}
        self.grow = attach(optimizer=getattr(optimizer, "optimizer", optimizer), **(given | self.settings))
        self._hook, self._trainer, self._step = HostAlone.on(parts["model"]), trainer, trainer.training_step
        self._parts: list[Any] = []
        trainer.training_step = self._grow  # type: ignore[method-assign, assignment]  # the Trainer has no hook there
        cast(dict[str, Any], state.stateful_callbacks)["esper"] = {"run": self._run, "folder": str(output.resolve())}

    def _grow(self, model: Any, inputs: Any, *others: Any) -> Any:
        """The Trainer's step on a micro-batch: afterwards its backward pass is done, and no gradient is clipped yet."""
        batch = to_device(inputs, self.grow.device)  # type: ignore[union-attr]  # a copy: a loss may pop the labels
        self._parts.append(self._step(model, inputs, *others))  # its part of the step's mean loss
        self.grow.after_backward(batch)  # type: ignore[union-attr]
        return self._parts[-1]

    def on_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any) -> None:
        """A tick: the optimizer has stepped and the gradients are still there."""
        self.grow.tick(sum(self._parts))  # type: ignore[union-attr]
        self._parts.clear()

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any) -> None:
        """Pass measurements on held-out data to controllers and strategies."""
        values = {f"validation/{k.removeprefix('eval_')}": v for k, v in parts["metrics"].items() if isinstance(v, float)}
        if self.grow is not None:  # a Trainer evaluates without training, too
            self.grow.observe(values, "validation/loss" if "validation/loss" in values else None, maximize=False)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any) -> None:
        """Keep the branches in the checkpoint's folder, under the name that the Trainer's state in it holds."""
        if state.is_world_process_zero and not state.is_hyper_param_search:
            self.grow.save_branches(Path(args.output_dir or "", f"checkpoint-{state.global_step}", self._run))  # type: ignore[union-attr]

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any) -> None:
        """End the run; ``callback.grow.export()`` gives the plain model."""
        if args.load_best_model_at_end and (best := Path(state.best_model_checkpoint or "")).name:  # that host has just come back
            then = TrainerState.load_from_json(str(best / "trainer_state.json"))
            self.grow.load_branches(_beside(then, best.parent))  # type: ignore[union-attr]
        self._hook.remove()
        self._trainer.training_step = self._step  # type: ignore[method-assign]
        self.grow.close()  # type: ignore[union-attr]


def _beside(state: TrainerState, output: Path, moved_to: Path = Path()) -> Path:
    """The branches beside the checkpoint that the Trainer has loaded, whose name it does not tell."""
    note, name = grown_in(cast(dict[str, Any], state.stateful_callbacks or {})), f"checkpoint-{state.global_step}"
    return found(note["run"], output / name, Path(note["folder"], name), moved_to)
