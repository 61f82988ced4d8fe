"""A tiny GPT-2 of transformers, with fresh weights, under transformers' own Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from growing import same, short
from torch.nn import functional
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

from esper import attach
from esper.controllers import CONFIGS
from esper.engine.grow import Grow
from esper.errors import UserError
from esper.integrations.transformers import GrowCallback

SCRIPT = [{"at": "2step", "command": "germinate", "site": "transformer.h.1.mlp.c_fc", "count": 1}]


def samples(count: int, seed: int) -> list[dict[str, torch.Tensor]]:
    """Arithmetic progressions modulo 30: what comes next can be learnt."""
    draws = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        first, step = torch.randint(0, 30, (2,), generator=draws).tolist()
        tokens = (first + step * torch.arange(8)) % 30
        found.append({"input_ids": tokens, "labels": tokens})
    return found


def trainer(folder: Path, callback: GrowCallback, steps: int, kind: type[Trainer] = Trainer, **changes: Any) -> Trainer:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=16, n_head=2, n_positions=8, vocab_size=30, bos_token_id=0, eos_token_id=0))
    settings = {"max_steps": steps, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "learning_rate": 3e-3}
    settings |= {"report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1000}
    arguments = TrainingArguments(output_dir=str(folder), **(settings | changes))
    return kind(model=model, args=arguments, train_dataset=samples(128, 1), eval_dataset=samples(32, 2), callbacks=[callback])


def callback(**changes: Any) -> GrowCallback:
    judge = list(DataLoader(samples(64, 3), batch_size=8))
    given = {"judge": judge, "lifecycle": short(), "per_site": 2, "controller": CONFIGS["scheduled"](script=SCRIPT)}
    return GrowCallback(**(given | changes))


def test_a_seed_lives_through_its_stages_and_the_exported_model_is_transformers_own(tmp_path: Path) -> None:
    own = callback()
    running = trainer(tmp_path, own, 24, eval_strategy="steps", eval_steps=8)
    running.train()
    grow = own.grow
    assert grow is not None and grow.steps == 24
    assert [site.name for site in grow.registry.sites] == ["transformer.h.0.mlp.c_fc", "transformer.h.1.mlp.c_fc"]
    reached = [name for name, _ in grow.registry.branches[0].path]
    assert reached[:4] == ["GERMINATED", "TRAINING", "GRAFTING", "STABILIZATION"] and "EVALUATING" in reached
    assert grow.measurements.metric is not None
    plain = grow.export().eval()
    batch = {name: value[None] for name, value in samples(1, 4)[0].items()}
    running.model.eval()
    with torch.no_grad():
        torch.testing.assert_close(plain(**batch).logits, running.model(**batch).logits, rtol=1e-4, atol=1e-5)
    assert isinstance(plain, GPT2LMHeadModel)


def test_a_dormant_callback_leaves_training_bit_for_bit(tmp_path: Path) -> None:
    quiet = GrowCallback(judge=list(DataLoader(samples(8, 3), batch_size=8)), controller="none")
    first = trainer(tmp_path, quiet, 20)
    first.train()
    second = trainer(tmp_path, quiet, 20)
    second.remove_callback(GrowCallback)
    second.train()
    for (name, value), (_, other) in zip(quiet.grow.export().state_dict().items(), second.model.state_dict().items(), strict=True):
        assert torch.equal(value, other), name
    assert quiet.grow.registry.table.counts()["DORMANT"] == 8


class Own(Trainer):  # type: ignore[misc]
    """A loss of the user's own: the model never sees the labels and returns no loss."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        labels = inputs.pop("labels")
        output = model(**inputs)
        loss = own_loss(output.logits, labels)
        return (loss, output) if return_outputs else loss


def own_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), label_smoothing=0.3)


LOSSES: dict[str, tuple[type[Trainer], dict[str, Any]]] = {
    "smoothed labels": (Trainer, {"label_smoothing_factor": 0.1}),
    "a compute_loss of one's own": (Own, {}),
}


@pytest.mark.parametrize("name", list(LOSSES))
def test_a_seed_learns_from_the_loss_that_the_trainer_computes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    kind, changes = LOSSES[name]
    own, logged, told = callback(), [], []

    class Logged(TrainerCallback):  # type: ignore[misc]
        def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
            logged.extend([logs["loss"]] if "loss" in logs else [])

    tick = Grow.tick
    monkeypatch.setattr(Grow, "tick", lambda self, metric=None: told.append(float(metric)) or tick(self, metric))
    running = trainer(tmp_path, own, 14, kind, **(changes | {"logging_steps": 1, "eval_strategy": "steps", "eval_steps": 7}))
    running.add_callback(Logged())
    running.train()
    assert [stage for stage, _ in own.grow.registry.branches[0].path][:4] == ["GERMINATED", "TRAINING", "GRAFTING", "STABILIZATION"]
    assert told == pytest.approx(logged, abs=1e-3), "the loss of a step is the Trainer's"
    model, batch = running.model.eval(), own.settings["judge"][0]
    with torch.no_grad():
        torch.testing.assert_close(own.grow.loss(model, batch), running.compute_loss(model, dict(batch)))
        assert abs(float(own.grow.loss(model, batch)) - float(model(**batch).loss)) > 1e-4, "it is not the model's own"
    assert "labels" in batch and running.training_step.__func__ is Trainer.training_step


def test_a_loss_that_is_given_is_the_one_that_seeds_learn_from(tmp_path: Path) -> None:
    asked = []

    def loss(model: Any, batch: Any) -> torch.Tensor:
        asked.append(sorted(batch))
        return own_loss(model(input_ids=batch["input_ids"]).logits, batch["labels"])

    own = callback(loss=loss)
    trainer(tmp_path, own, 14, Own).train()
    assert own.grow.registry.branches[0].stage.name not in ("GERMINATED", "TRAINING") and set(map(tuple, asked)) == {
        ("input_ids", "labels")
    }


@pytest.mark.parametrize("name", list(LOSSES))
def test_judge_batches_without_a_loss_are_refused_in_words(tmp_path: Path, name: str) -> None:
    kind, changes = LOSSES[name]
    bare = [{"input_ids": batch["input_ids"]} for batch in callback().settings["judge"]]
    with pytest.raises(UserError, match=r"no loss in a batch \(.+\): give judge= batches like those trained on, or loss=\.$"):
        trainer(tmp_path, callback(judge=bare), 14, kind, **changes).train()


class Interrupted(TrainerCallback):  # type: ignore[misc]
    """Ends the process's part at a step, as a kill would: nothing after it is said or saved."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def interrupted(folder: Path, step: int, steps: int, **changes: Any) -> GrowCallback:
    """Train to ``step`` of ``steps`` and no further; the checkpoints stay in ``folder``."""
    own = callback()
    running = trainer(folder, own, steps, **(SAVING | changes))
    running.add_callback(Interrupted(step))
    with pytest.raises(KeyboardInterrupt):
        running.train()
    return own


SAVING = {"save_strategy": "steps", "save_steps": 4, "eval_strategy": "steps", "eval_steps": 4}


@pytest.mark.parametrize(("at", "reached"), [(4, "TRAINING"), (12, "EVALUATING")])
def test_a_run_resumed_from_a_checkpoint_ends_with_the_bits_of_the_undisturbed_one(tmp_path: Path, at: int, reached: str) -> None:
    """With dropout, shuffled data, a falling rate and accumulation; 12 lies in the middle of an epoch."""
    whole = callback()
    trainer(tmp_path / "whole", whole, 24, **SAVING).train()
    first = interrupted(tmp_path / "run", at + 1, 24)
    assert first.grow.registry.branches[0].stage.name == reached
    again = callback()
    trainer(tmp_path / "run", again, 24, **SAVING).train(resume_from_checkpoint=True)
    assert again.grow.steps == again.grow.tick_number == 24
    same(whole.grow.registry.model.state_dict(), again.grow.registry.model.state_dict())
    assert again.grow.observer.branch_cards() == whole.grow.observer.branch_cards()
    same(whole.grow.export().state_dict(), again.grow.export().state_dict())


def test_a_checkpoint_holds_the_host_as_transformers_saves_it_with_what_grew_beside(tmp_path: Path) -> None:
    own = callback()
    trainer(tmp_path, own, 12, **SAVING).train()
    folder = tmp_path / "checkpoint-12"
    assert {path.name.partition("-")[0] for path in folder.iterdir() if path.is_dir()} == {"esper"}
    plain, missed = GPT2LMHeadModel.from_pretrained(folder, output_loading_info=True)
    assert not any(missed.values())
    same({name: value for name, value in plain.state_dict().items() if name != "lm_head.weight"}, _own(own))
    moved = folder.rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"in none of .*/checkpoint-12: .* GrowCallback.resume_from="):
        trainer(tmp_path / "other", callback(), 16).train(resume_from_checkpoint=str(moved))
    told = callback(resume_from=moved)
    trainer(tmp_path / "other", told, 16).train(resume_from_checkpoint=str(moved))
    assert told.grow.steps == 16


def test_a_checkpoint_of_another_run_with_the_same_name_does_not_stand_in(tmp_path: Path) -> None:
    interrupted(tmp_path / "first", 5, 12)
    interrupted(tmp_path / "second", 5, 12)
    next((tmp_path / "first" / "checkpoint-4").glob("esper-*")).rename(tmp_path / "lost")
    with pytest.raises(UserError, match=r"in none of .*checkpoint-4: take an earlier checkpoint"):
        trainer(tmp_path / "second", callback(), 12).train(resume_from_checkpoint=str(tmp_path / "first" / "checkpoint-4"))


def _own(own: GrowCallback) -> dict[str, torch.Tensor]:
    return {name: value for name, value in own.grow.host_state().items() if name != "lm_head.weight"}


def test_the_best_model_loaded_at_the_end_comes_with_the_branches_it_had(tmp_path: Path) -> None:
    own = callback()
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}  # so that it is an early one
    running = trainer(tmp_path, own, 24, **(SAVING | best))
    running.train()
    folder = Path(running.state.best_model_checkpoint)
    assert 0 < own.grow.steps == running.state.best_global_step < 24
    host = GPT2LMHeadModel.from_pretrained(folder)
    other = attach(host, total_steps=24, state=next(folder.glob("esper-*")), **own.settings)
    assert other.registry.blended(1)
    same(other.export().state_dict(), own.grow.export().state_dict())


def test_a_checkpoint_in_which_nothing_could_have_grown_is_refused(tmp_path: Path) -> None:
    first = trainer(tmp_path, callback(), 4, save_strategy="steps", save_steps=2)
    first.remove_callback(GrowCallback)
    first.train()
    with pytest.raises(UserError, match="saved without a GrowCallback"):
        trainer(tmp_path, callback(), 6).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_when_a_scaled_backward_pass_ends_the_branches_gradients_are_out_of_reach_of_clipping(tmp_path: Path) -> None:
    """accelerate clips ``model.parameters()`` before any callback is asked: half precision needs a GPU there, its scaler does not."""
    own = callback()
    running = trainer(tmp_path, own, 24)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    own.settings["scaler"] = scaler
    clipped = []

    class Clipping(TrainerCallback):  # type: ignore[misc]
        def on_pre_optimizer_step(self, *_: Any, model: Any, **__: Any) -> None:
            clipped.append([name for name, p in model.named_parameters() if "seed_layer" in name and p.grad is not None])

    running.callback_handler.callbacks.insert(0, Clipping())
    running.train()
    assert len(clipped) == 24 and not any(clipped)
    bank = own.grow.registry.layers[1].bank("mlp")
    assert int(bank.steps.max()) == 3, "it learned all the same: two steps of TRAINING, one of GRAFTING"
