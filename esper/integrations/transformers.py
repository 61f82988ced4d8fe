"""A model that grows under transformers' ``Trainer``: ``Trainer(…, callbacks=[GrowCallback(judge=…)])``."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from esper.errors import UserError
from esper.training import Grow, attach
from esper.training.calls import Calls
from esper.training.checkpoint.attached import found

ITEMS = "num_items_in_batch"  # a model that is given it gives a micro-batch's part of the step's mean


class GrowCallback(TrainerCallback):  # type: ignore[misc]
    """Attaches when training begins; the model's own loss (``model(**batch).loss``) is used unless ``loss`` is given.

    ``settings`` is what ``esper.attach`` takes; ``judge`` is needed for anything to be kept; unless given, ``controller`` is
    ``heuristic`` and ``sites`` the hidden layers of the perceptrons. ``resume_from`` names a checkpoint's folder that was moved.
    """

    def __init__(self, resume_from: str | Path = "", **settings: Any) -> None:
        self.settings = {"controller": "heuristic", "sites": "mlp_hidden", **settings}
        self.grow: Grow | None = None
        self._calls: Calls | None = None
        self._moved_to, self._run = Path(resume_from), f"esper-{secrets.token_hex(8)}"

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any) -> None:
        """Attach: model and optimizer are prepared, and hold what a checkpoint kept of them."""
        optimizer, steps, output = parts["optimizer"], args.gradient_accumulation_steps, Path(args.output_dir)
        given = {"total_steps": state.max_steps, "accumulate": steps, "seed": args.seed, "scaler": getattr(optimizer, "scaler", None)}
        given |= {"state": _beside(state, output, self._moved_to)} if state.global_step else {}
        self.grow = attach(parts["model"], optimizer=getattr(optimizer, "optimizer", optimizer), **(given | self.settings))
        self._calls = Calls(parts["model"], (ITEMS,), lambda named: 1 / steps if named.get(ITEMS) is None else 1, self.grow.set_aside)
        state.stateful_callbacks["esper"] = {"run": self._run, "folder": str(output.resolve())}

    def on_substep_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any) -> None:
        """A micro-batch that ends no step is done."""
        self.on_pre_optimizer_step(args, state, control)
        self._calls.batch = None  # type: ignore[union-attr]

    def on_pre_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any) -> None:
        """The last micro-batch of a step is done."""
        if self._calls.batch is not None:  # type: ignore[union-attr]
            self.grow.after_backward(self._calls.batch)  # type: ignore[union-attr]

    def on_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any) -> None:
        """A tick: the optimizer has stepped and the gradients are still there."""
        self.grow.tick(self._calls.loss())  # type: ignore[union-attr]

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any) -> None:
        """What was measured on held-out data, for controllers and strategies."""
        values = {f"validation/{k.removeprefix('eval_')}": v for k, v in parts["metrics"].items() if isinstance(v, float)}
        if self.grow is not None:  # a Trainer evaluates without training, too
            self.grow.observe(values, "validation/loss" if "validation/loss" in values else None, maximize=False)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any) -> None:
        """Keep what grew in the checkpoint's folder, under the name that the Trainer's state in it holds."""
        if state.is_world_process_zero and not state.is_hyper_param_search:
            self.grow.save_branches(Path(args.output_dir, f"checkpoint-{state.global_step}", self._run))  # type: ignore[union-attr]

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **parts: Any) -> None:
        """Say that the run is over; ``callback.grow.export()`` gives the plain model."""
        if args.load_best_model_at_end and (best := Path(state.best_model_checkpoint or "")).name:  # that host has just come back
            then = TrainerState.load_from_json(str(best / "trainer_state.json"))
            self.grow.load_branches(_beside(then, best.parent))  # type: ignore[union-attr]
        self._calls.close()  # type: ignore[union-attr]
        self.grow.close()  # type: ignore[union-attr]


def _beside(state: TrainerState, output: Path, moved_to: Path = Path()) -> Path:
    """What grew, beside the checkpoint that the Trainer has loaded, which it names to nobody."""
    note, name = state.stateful_callbacks.get("esper"), f"checkpoint-{state.global_step}"
    if not note:
        raise UserError("This checkpoint was saved without a GrowCallback and holds nothing that grew; begin anew with its weights.")
    return found(note["run"], output / name, Path(note["folder"], name), moved_to)
