"""Depth growth in models of transformers, whose blocks are given masks and positions and answer as their version likes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from growing import Notebook, batch, germinate, sample_loss, short
from torch import Tensor, nn

from esper import attach, load_model
from esper.blueprints import Block
from esper.engine.grow import Grow
from esper.errors import UserError

Data = dict[str, Tensor]
SIZE: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
WORDS: dict[str, Any] = {"vocab_size": 30, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}


def text(size: int, seed: int) -> Data:
    """Arithmetic progressions, the last two places padded."""
    draws = torch.randint(1, 30, (size, 2), generator=torch.Generator().manual_seed(seed))
    tokens = (draws[:, :1] + torch.arange(8) * draws[:, 1:]) % 30
    mask = torch.ones_like(tokens)
    mask[:, 6:] = 0
    return {"input_ids": tokens, "attention_mask": mask, "labels": tokens.masked_fill(mask == 0, -100)}


def classes(size: int, seed: int) -> Data:
    data = text(size, seed)
    return data | {"labels": data["input_ids"][:, 0] % 3}


def images(size: int, seed: int) -> Data:
    pixels = torch.randn(size, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    return {"pixel_values": pixels, "labels": pixels.flatten(1)[:, :3].argmax(1)}


def llama() -> nn.Module:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**SIZE, **WORDS, num_key_value_heads=1, max_position_embeddings=16))


def t5() -> nn.Module:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 2}
    return hf.T5ForConditionalGeneration(hf.T5Config(**sizes, **WORDS, decoder_start_token_id=0))


def gpt2() -> nn.Module:
    return hf.GPT2LMHeadModel(hf.GPT2Config(n_layer=2, n_embd=16, n_head=2, n_positions=8, **WORDS))


def bert() -> nn.Module:
    return hf.BertForSequenceClassification(hf.BertConfig(**SIZE, **WORDS, max_position_embeddings=16, num_labels=3))


def vit() -> nn.Module:
    return hf.ViTForImageClassification(hf.ViTConfig(**SIZE, image_size=8, patch_size=4, num_channels=1, num_labels=3))


COPY = Block(start="copy")
HOSTS: dict[str, tuple[Callable[[], nn.Module], Callable[[int, int], Data], Block, str, str]] = {
    "GPT-2": (gpt2, text, Block(output_layers=["attn.c_proj", "mlp.c_proj"]), "residual", "transformer.h.0"),
    "Llama": (llama, text, Block(output_layers=["self_attn.o_proj", "mlp.down_proj"]), "residual", "model.layers.0"),
    "BERT": (bert, classes, COPY, "residual", "bert.encoder.layer.0"),
    "ViT": (vit, images, COPY, "residual", "vit.layers.0"),
    "T5, whose blocks give tuples": (t5, text, COPY, "decoder.block.*", "decoder.block.1"),
}


def grown(name: str, steps: int) -> tuple[Grow, nn.Module]:
    """A model that has trained with one block growing beside one of its own."""
    make, data, block, sites, place = HOSTS[name]
    torch.manual_seed(0)
    model, port = make(), Notebook({1: [germinate(place)]})
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    given: dict[str, Any] = {"judge": [data(16, 1000)], "lifecycle": short(), "sites": sites, "blueprint": block, "port": port}
    grow = attach(model, optimizer=optimizer, total_steps=100, **given)
    model.train()
    for step in range(steps):
        loss = model(**data(8, step)).loss
        loss.backward()
        grow.after_backward(data(8, step), loss.detach())
        optimizer.step()
        grow.tick(loss.detach())
        optimizer.zero_grad()
    return grow, model


@pytest.mark.parametrize("steps", [7, 12], ids=["blending", "blended"])
@pytest.mark.parametrize("name", list(HOSTS))
def test_a_block_grows_beside_one_of_the_hosts_and_exports_the_same(name: str, steps: int) -> None:
    grow, model = grown(name, steps)
    branch = grow.registry.branches[0]
    assert [stage for stage, _ in branch.path][:3] == ["GERMINATED", "TRAINING", "GRAFTING"]
    assert 0.0 < float(grow.registry.branches.alpha[0]) <= 1.0
    plain, data = grow.export().eval(), HOSTS[name][1](4, 77)
    model.eval()
    with torch.no_grad():
        live = model(**data).logits
        torch.testing.assert_close(plain(**data).logits, live)
        with grow.registry.without(branch):
            assert not torch.allclose(model(**data).logits, live)
    assert type(plain) is type(model)


def test_a_grown_block_is_given_the_hosts_mask() -> None:
    grow, model = grown("BERT", 12)
    model.eval()
    data, plain = classes(4, 5), grow.export().eval()
    other = data | {"input_ids": data["input_ids"].masked_fill(data["attention_mask"] == 0, 7)}
    assert not torch.equal(data["input_ids"], other["input_ids"])
    with torch.no_grad():
        for asked in (model, plain):
            torch.testing.assert_close(asked(**data).logits, asked(**other).logits)


def test_a_saved_model_with_a_grown_block_comes_back(tmp_path: Path) -> None:
    grow, _ = grown("Llama", 12)
    grow.save(tmp_path)
    loaded = load_model(tmp_path, llama()).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(**text(4, 5)).logits, grow.export().eval()(**text(4, 5)).logits)


def test_generating_needs_no_cache_and_says_so() -> None:
    grow, model = grown("Llama", 12)
    prompt = text(2, 9)["input_ids"][:, :4]
    for asked in (model.eval(), grow.export().eval()):
        with pytest.raises(UserError, match="generate with use_cache=False"):
            asked.generate(prompt, max_new_tokens=3, do_sample=False)
        made = asked.generate(prompt, max_new_tokens=3, do_sample=False, use_cache=False, eos_token_id=None)
        assert made.shape == (2, 7)


@dataclass
class Answer:
    """What a block of somebody's own gives."""

    hidden: Tensor
    seen: int


class Own(nn.Module):
    """A residual block that answers with a dataclass or a mapping, is called by name, or cannot be called again."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.inner, self.kind = nn.Linear(6, 6), kind

    def forward(self, *, hidden: Tensor, label: Tensor) -> Any:
        if self.kind == "fails" and hidden.requires_grad is False and not torch.equal(label, hidden):
            raise RuntimeError("the label is not the input")
        made = hidden + torch.tanh(self.inner(hidden))
        return Answer(made, 1) if self.kind == "dataclass" else {"hidden": made, "seen": 1}


class Host(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.block, self.head, self.kind = Own(kind), nn.Linear(6, 3), kind

    def forward(self, x: Tensor) -> Tensor:
        given = self.block(hidden=x, label=x)
        return self.head(given.hidden if self.kind == "dataclass" else given["hidden"])


@pytest.mark.parametrize("kind", ["dataclass", "mapping"])
def test_blocks_that_answer_with_containers_grow(kind: str) -> None:
    torch.manual_seed(0)
    model, port = Host(kind), Notebook({1: [germinate("block")]})
    judge = [batch("mlp", 900)]
    given: dict[str, Any] = {"loss": sample_loss, "judge": judge, "sites": "block", "blueprint": Block(output_layers=["inner"])}
    grow = attach(model, total_steps=100, lifecycle=short(), port=port, **given)
    for step in range(9):
        sample_loss(model, batch("mlp", step)).mean().backward()
        grow.after_backward(batch("mlp", step))
        grow.tick(1.0)
    assert grow.registry.branches.alpha[0] > 0
    x = batch("mlp", 5)[0]
    with torch.no_grad():
        torch.testing.assert_close(grow.export()(x), model(x))


def test_a_block_that_cannot_be_called_again_is_refused_in_one_sentence() -> None:
    with pytest.raises(UserError, match=r"cannot grow at 'block': a second Own behind it fails: the label is not the input\."):
        attach(Host("fails"), loss=sample_loss, judge=[batch("mlp")], total_steps=100, sites="block", blueprint=COPY)
