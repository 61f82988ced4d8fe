"""Sites by role in models that esper did not build: tiny ones of transformers, and of timm where it is installed."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
import torch
import transformers as hf
from growing import Net, batch, build
from torch import nn

from esper.errors import UserError
from esper.seeds import find_sites

IDS = torch.arange(16).reshape(2, 8)
IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
TOKENS = {"vocab_size": 32, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
Case = tuple[Callable[[], nn.Module], dict[str, Any], dict[str, list[str]]]

CASES: dict[str, Case] = {
    "gpt2": (
        lambda: hf.GPT2LMHeadModel(hf.GPT2Config(n_layer=2, n_embd=16, n_head=2, n_positions=8, **TOKENS)),
        {"input_ids": IDS},
        {"mlp_hidden": ["transformer.h.0.mlp.c_fc", "transformer.h.1.mlp.c_fc"], "residual": ["transformer.h.0", "transformer.h.1"]},
    ),
    "llama": (
        lambda: hf.LlamaModel(hf.LlamaConfig(num_key_value_heads=2, **SMALL, **TOKENS)),
        {"input_ids": IDS},
        {
            "mlp_hidden": [f"layers.{n}.mlp.{part}_proj" for n in (0, 1) for part in ("gate", "up")],
            "residual": ["layers.0", "layers.1"],
        },
    ),
    "bert": (
        lambda: hf.BertModel(hf.BertConfig(**SMALL, vocab_size=32), add_pooling_layer=False),
        {"input_ids": IDS},
        {
            "mlp_hidden": ["encoder.layer.0.intermediate.dense", "encoder.layer.1.intermediate.dense"],
            "residual": ["encoder.layer.0", "encoder.layer.1"],
        },
    ),
    "vit": (
        lambda: hf.ViTModel(hf.ViTConfig(**SMALL, image_size=16, patch_size=8), add_pooling_layer=False),
        {"pixel_values": IMAGES},
        {"residual": ["layers.0", "layers.1"], "conv_out": ["embeddings.patch_embeddings.projection"]},
    ),
    "resnet": (
        lambda: hf.ResNetModel(hf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], layer_type="basic")),
        {"pixel_values": IMAGES},
        {"residual": ["encoder.stages.0.layers.0", "encoder.stages.1.layers.1"]},
    ),
    "cnn": (
        lambda: build("cnn_group"),
        {"inputs": batch("cnn_group", 0, 2)[0]},
        {
            "residual": ["stages.0.blocks.0", "stages.1.blocks.0"],
            "conv_out": [
                "stem",
                "stages.0.blocks.0.conv1",
                "stages.0.blocks.0.conv2",
                "stages.1.down",
                "stages.1.blocks.0.conv1",
                "stages.1.blocks.0.conv2",
            ],
        },
    ),
    "mlp": (lambda: build("mlp"), {"x": batch("mlp", 0, 2)[0]}, {"mlp_hidden": ["fc1", "fc2"]}),
}
if find_spec("timm") is not None:  # needs torchvision, of which there is no CPU build here: runs where a GPU is

    def timm_model(name: str, **settings: Any) -> Callable[[], nn.Module]:
        """A model of timm with fresh weights."""
        import timm

        return lambda: timm.create_model(name, pretrained=False, **settings)

    CASES |= {
        "timm_vit": (
            timm_model("vit_tiny_patch16_224", img_size=32, depth=2),
            {"x": torch.randn(2, 3, 32, 32)},
            {
                "mlp_hidden": ["blocks.0.mlp.fc1", "blocks.1.mlp.fc1"],
                "residual": ["blocks.0", "blocks.1"],
                "conv_out": ["patch_embed.proj"],
            },
        ),
        "timm_resnet": (
            timm_model("resnet18"),
            {"x": torch.randn(2, 3, 32, 32)},
            {"residual": ["layer1.0", "layer1.1", "layer2.1", "layer3.1", "layer4.1"]},
        ),
    }


@pytest.mark.parametrize(("name", "role"), [(name, role) for name, case in CASES.items() for role in case[2]])
def test_roles_are_found_from_what_the_model_computes(name: str, role: str) -> None:
    make, inputs, expected = CASES[name]
    model = make()
    sites = find_sites(model, [role], 1, lambda: model(**inputs))
    assert [site.name for site in sites] == expected[role]


def test_roles_stand_beside_patterns_and_a_role_that_nothing_has_is_refused() -> None:
    model = build("mlp")
    assert [site.name for site in find_sites(model, ["mlp_hidden", "head"], 1, lambda: model(batch("mlp")[0]))] == ["fc1", "fc2", "head"]
    with pytest.raises(UserError, match=r"sites.match=conv_out finds no such module"):
        find_sites(model, ["conv_out"], 1, lambda: model(batch("mlp")[0]))


def test_a_module_that_bears_a_roles_name_is_meant_by_it() -> None:
    class Named(Net):
        def __init__(self) -> None:
            super().__init__()
            self.residual = nn.Linear(6, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(self.residual(x))

    model = Named()
    assert [site.name for site in find_sites(model, ["residual"], 1, lambda: model(batch("mlp")[0]))] == ["residual"]


def test_watching_leaves_no_hook_and_no_gradient_and_draws_nothing() -> None:
    model = build("dropout")
    state = torch.get_rng_state()
    find_sites(model, ["mlp_hidden"], 1, lambda: model(batch("mlp")[0]))
    assert torch.equal(state, torch.get_rng_state())
    assert not any(module._forward_hooks for module in model.modules())
    assert model.training and all(parameter.grad is None for parameter in model.parameters())


def test_the_linear_layer_that_gpt2_calls_conv1d_has_its_features_last() -> None:
    make, inputs, _ = CASES["gpt2"]
    model = make()
    for site in find_sites(model, ["mlp_hidden", "residual"], 1, lambda: model(**inputs)):
        assert (site.geometry.width, site.geometry.dim) == (64 if "c_fc" in site.name else 16, -1)
