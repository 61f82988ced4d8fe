"""A tiny GPT-2 of transformers, with fresh weights, under transformers' own Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from growing import short
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from esper.controllers import CONFIGS
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


def trainer(folder: Path, callback: GrowCallback, steps: int, **changes: Any) -> Trainer:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=16, n_head=2, n_positions=8, vocab_size=30, bos_token_id=0, eos_token_id=0))
    settings = {"max_steps": steps, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "learning_rate": 3e-3}
    settings |= {"report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1000}
    arguments = TrainingArguments(output_dir=str(folder), **(settings | changes))
    return Trainer(model=model, args=arguments, train_dataset=samples(128, 1), eval_dataset=samples(32, 2), callbacks=[callback])


def callback() -> GrowCallback:
    judge = list(DataLoader(samples(64, 3), batch_size=8))
    return GrowCallback(judge=judge, lifecycle=short(), per_site=2, controller=CONFIGS["scheduled"](script=SCRIPT))


def test_a_seed_lives_through_its_stages_and_the_exported_model_is_transformers_own(tmp_path: Path) -> None:
    own = callback()
    running = trainer(tmp_path, own, 24, eval_strategy="steps", eval_steps=8)
    running.train()
    grow = own.grow
    assert grow is not None and grow.steps == 24
    assert [site.name for site in grow.garden.sites] == ["transformer.h.0.mlp.c_fc", "transformer.h.1.mlp.c_fc"]
    reached = [name for name, _ in grow.garden.branches[0].path]
    assert reached[:4] == ["GERMINATED", "TRAINING", "GRAFTING", "STABILIZATION"] and "EVALUATING" in reached
    assert grow.advance.metric is not None
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
    assert quiet.grow.garden.table.counts()["DORMANT"] == 8


def test_going_on_from_a_checkpoint_of_the_trainer_is_refused(tmp_path: Path) -> None:
    first = trainer(tmp_path, callback(), 4, save_strategy="steps", save_steps=2)
    first.remove_callback(GrowCallback)
    first.train()
    with pytest.raises(UserError, match="cannot go on from a checkpoint"):
        trainer(tmp_path, callback(), 6).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
