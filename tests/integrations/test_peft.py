"""Ranks that grow on transformers' models, and the adapters that peft makes of what was saved."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from growing import short
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from esper import attach
from esper.controllers import CONFIGS
from esper.engine.grow import Grow
from esper.engine.learning.branch_optimizer import BranchLearning
from esper.errors import UserError
from esper.integrations.peft import lora_settings, ranks, save_adapter
from esper.integrations.transformers import GrowCallback

Batch = dict[str, Tensor]
SETTINGS: dict[str, Any] = {
    "lifecycle": short(reseed=True, gain=0.0, training_min="10step", significance=0.5),
    "learning": BranchLearning(lr=2e-2),
    "count_macs": False,
    "total_steps": 60,
}


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=16, n_head=2, n_positions=8, vocab_size=30, bos_token_id=0, eos_token_id=0))


def bert() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "max_position_embeddings": 8}
    return BertForSequenceClassification(BertConfig(vocab_size=30, **sizes))


def progressions(number: int, count: int = 16) -> Batch:
    """Arithmetic progressions modulo 30: what comes next can be learnt."""
    draws = torch.Generator().manual_seed(number)
    first, step = (torch.randint(*span, (count, 1), generator=draws) for span in ((0, 30), (1, 3)))
    ids = (first + step * torch.arange(8)) % 30
    return {"input_ids": ids, "labels": ids}


def classes(number: int, count: int = 16) -> Batch:
    """Whether a progression's first number is in the upper half."""
    ids = progressions(number, count)["input_ids"]
    return {"input_ids": ids, "labels": (ids[:, 0] >= 15).long()}


def script(*waves: dict[str, Any]) -> Any:
    return CONFIGS["scheduled"](script=[{"command": "germinate", **wave} for wave in waves])


def trained(model: nn.Module, config: LoraConfig, batch: Any, **changes: Any) -> Grow:
    """Two waves of ranks, the second at the first layer alone, in a plain loop."""
    waves = script({"at": "1step", "site": "*"}, {"at": "35step", "site": "*.0.*", "count": 1})
    judge = [batch(900 + number, 8) for number in range(8)]
    settings = lora_settings(model, config, **(SETTINGS | {"judge": judge, "controller": waves} | changes))
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    grow = attach(model, optimizer=torch.optim.AdamW(learning, 1e-2) if learning else None, **settings)
    for number in range(60):
        data = batch(number)
        loss = model(**data).loss
        loss.backward()
        grow.after_backward(data, loss.detach())
        if grow.optimizer is not None:
            grow.optimizer.step()
            grow.optimizer.zero_grad()
        grow.tick(loss.detach())
    return grow


def logits(model: nn.Module, batch: Batch) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(**batch).logits
    return found


CASES: dict[str, tuple[Any, LoraConfig, Any]] = {
    "gpt2": (gpt2, LoraConfig(r=2, lora_alpha=6, target_modules=["c_attn", "c_fc"], task_type="CAUSAL_LM"), progressions),
    "bert": (bert, LoraConfig(r=3, lora_alpha=3, target_modules=r".*\.(query|value)", use_rslora=True, task_type="SEQ_CLS"), classes),
}


@pytest.mark.parametrize("name", list(CASES))
def test_peft_loads_what_grew_and_computes_the_same(tmp_path: Path, name: str) -> None:
    build, config, batch = CASES[name]
    config = copy.deepcopy(config)
    model = build()
    grow = trained(model, config, batch)
    found = ranks(grow)
    assert found and (name != "gpt2" or set(found.values()) == {2, 4}), "of GPT-2 one layer has twice the ranks of the others"
    save_adapter(grow, tmp_path, config)
    told = json.loads((tmp_path / "adapter_config.json").read_text())
    assert told["rank_pattern"] == found and set(told["target_modules"]) == set(found)
    loaded = PeftModel.from_pretrained(build(), tmp_path)
    expected = logits(model, batch(7))
    assert float((expected - logits(build(), batch(7))).abs().max()) > 0.05, "something grew"
    torch.testing.assert_close(logits(grow.export(), batch(7)), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits(loaded, batch(7)), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits(loaded.merge_and_unload(), batch(7)), expected, rtol=1e-4, atol=1e-5)


def test_under_transformers_trainer_ranks_grow_on_a_model_in_which_nothing_else_learns(tmp_path: Path) -> None:
    model, config = gpt2(), LoraConfig(r=2, target_modules=["c_fc"])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    settings = lora_settings(
        model, config, judge=[progressions(900 + n, 8) for n in range(8)], controller=script({"at": "1step", "site": "*"})
    )
    callback = GrowCallback(**(settings | {"lifecycle": SETTINGS["lifecycle"]}))
    data = [{name: value[row] for name, value in progressions(1, 128).items()} for row in range(128)]
    given = {"max_steps": 24, "learning_rate": 1e-2, "report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
    trainer = Trainer(
        model=model, args=TrainingArguments(output_dir=str(tmp_path / "run"), **given), train_dataset=data, callbacks=[callback]
    )
    trainer.train()
    assert callback.grow is not None and ranks(callback.grow) == {f"transformer.h.{block}.mlp.c_fc": 2 for block in (0, 1)}
    host = callback.grow.host_state()
    assert all(torch.equal(value, before[name]) for name, value in host.items())
    save_adapter(callback.grow, tmp_path / "adapter", config)
    loaded = PeftModel.from_pretrained(gpt2(), tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded, progressions(7)), logits(model, progressions(7)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "asked",
    [
        {"target_modules": ["c_attn", "c_proj"]},
        {"target_modules": "all-linear"},
        {"target_modules": None},
        {"target_modules": r".*mlp\.c_fc", "exclude_modules": ["h.0.mlp.c_fc"]},
        {"target_modules": ["c_fc"], "layers_to_transform": [1]},
    ],
)
def test_ranks_grow_where_peft_would_put_its_own(asked: dict[str, Any]) -> None:
    config = LoraConfig(task_type="CAUSAL_LM", fan_in_fan_out=True, **asked)
    model: Any = gpt2()
    settings = lora_settings(model, config)
    assert settings["sites"] and not any(parameter.requires_grad for parameter in model.parameters())
    assert settings["sites"] == get_peft_model(gpt2(), config).base_model.targeted_module_names


class Twice(nn.Module):
    """A layer whose whole name ends that of another one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.outer = nn.ModuleDict({"inner": nn.ModuleDict({"layer": nn.Linear(4, 4)})})
        self.inner = nn.ModuleDict({"layer": nn.Linear(4, 4)})

    def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
        """Logits ``[N, 4]`` and their loss."""
        hidden = self.inner["layer"](torch.relu(self.outer["inner"]["layer"](input_ids.float()[:, :4] / 30)))
        return type("Output", (), {"logits": hidden, "loss": nn.functional.cross_entropy(hidden, labels)})


@pytest.mark.parametrize("which", ["inner.layer", "*"])
def test_no_rank_lands_on_a_layer_whose_name_only_ends_alike(tmp_path: Path, which: str) -> None:
    config = LoraConfig(r=1, target_modules=["layer"])
    model = Twice()
    grow = trained(model, config, classes, controller=script({"at": "1step", "site": which}, {"at": "35step", "site": "inner.layer"}))
    assert ranks(grow) == {"inner.layer": 2} | ({} if which != "*" else {"outer.inner.layer": 1})
    save_adapter(grow, tmp_path, config)
    loaded = PeftModel.from_pretrained(Twice(), tmp_path)
    torch.testing.assert_close(logits(loaded, classes(7)), logits(model, classes(7)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (
            {"target_modules": ["c_fc"], "use_dora": True},
            r"LoraConfig\(use_dora=True\) does not go with ranks that grow; leave use_dora out",
        ),
        ({"target_modules": ["c_fc"], "lora_dropout": 0.1}, r"LoraConfig\(lora_dropout=0.1\) does not go"),
        ({"target_modules": ["c_fc"], "rank_pattern": {"c_fc": 3}}, r"rank_pattern=\{'c_fc': 3\}\) does not go"),
        ({"target_modules": ["nowhere"]}, "peft does not adapt this model so: .*nowhere"),
        ({"target_modules": ["wte"]}, r"'transformer.wte' \(Embedding\) is no linear layer"),
    ],
)
def test_what_does_not_grow_is_refused_in_words(asked: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        lora_settings(gpt2(), LoraConfig(**asked))


def test_an_adapter_that_would_not_be_the_model_is_not_saved(tmp_path: Path) -> None:
    config = LoraConfig(r=1, target_modules=["c_fc"])
    with pytest.raises(UserError, match="has adapters of peft already"):
        lora_settings(get_peft_model(gpt2(), config), config)
    model = gpt2()
    grow = attach(model, **lora_settings(model, config, **SETTINGS, judge=[progressions(1)]))
    with pytest.raises(UserError, match="No rank was kept, so there is no adapter to save"):
        save_adapter(grow, tmp_path, config)
    model.transformer.ln_f.weight.requires_grad_(True)
    with pytest.raises(UserError, match=r"'transformer.ln_f.weight' of the host learns too, so the adapter alone would not be the model"):
        save_adapter(grow, tmp_path, config)
    assert not list(tmp_path.iterdir())
