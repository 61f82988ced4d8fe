"""Features are found where the host has them: after permutes and reshapes, in images with channels last, where streams meet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from growing import Notebook, batch, build, germinate, short
from torch import Tensor, nn
from torch.nn import functional

from esper import attach
from esper.errors import UserError
from esper.seeds import find_sites

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
Places = dict[str, tuple[int, int]]


def places(model: nn.Module, match: str, run: Callable[[], Any]) -> Places:
    """(dim, width) of every site that matches."""
    return {site.name: (site.geometry.dim, site.geometry.width) for site in find_sites(model, [match], 1, run)}


class Lasting(nn.Module):
    """A residual block on images with channels last, as Swin has them."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(6), nn.Linear(6, 10), nn.Linear(10, 6)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, H, W, 6]`` → the same."""
        return x + self.fc2(self.fc1(self.norm(x)).relu())


class Conformer(nn.Module):
    """A residual block of sequences ``[B, T, C]`` with a convolution in it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv1d(6, 6, 3, padding=1), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, T, 6]`` → the same."""
        x = x + self.fc(x).relu()
        return x + self.conv(x.transpose(1, 2)).transpose(1, 2)


class Mixer(nn.Module):
    """A residual block that mixes positions before it mixes features, the sum written the other way round."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.across, self.fc = nn.LayerNorm(6), nn.Linear(9, 9), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, 9, 6]`` → the same."""
        x = self.across(self.norm(x).transpose(1, 2)).transpose(1, 2) + x
        return self.fc(self.norm(x)).relu() + x


class Squeezed(nn.Module):
    """A convolution with a gate of its own features, flattened to tokens; the activation is one that nobody can look into."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.gate, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 8), nn.Linear(8, 3)
        self.act, self.tokens = Opaque(), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """``[B, 3, H, W]`` → ``[B, 3]``."""
        x = self.act(self.conv(x))
        x = x * torch.sigmoid(self.gate(x.mean((2, 3)))).view(len(x), 8, 1, 1)
        return self.head(self.tokens(x.flatten(2).permute(0, 2, 1)).mean(1))


class Opaque(nn.Module):
    """An activation written as a function with a backward of its own."""

    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x**3

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> Tensor:
            return gradients[0]

    def forward(self, x: Tensor) -> Tensor:
        """Elementwise."""
        return self.Cube.apply(x)  # type: ignore[no-any-return, no-untyped-call]


def stacked(kind: type[nn.Module]) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 6), kind(), kind(), nn.Linear(6, 6))


def test_blocks_have_their_features_where_the_stream_has_them() -> None:
    for kind, shape in ((Lasting, (4, 5, 7, 6)), (Conformer, (4, 9, 6)), (Mixer, (4, 9, 6))):
        model = stacked(kind)
        assert places(model, "residual", lambda m=model, s=shape: m(torch.randn(s))) == {"1": (-1, 6), "2": (-1, 6)}, kind
    model = stacked(Lasting)
    assert places(model, "mlp_hidden", lambda: model(torch.randn(4, 5, 7, 6))) == {"1.fc1": (-1, 10), "2.fc1": (-1, 10)}


def test_an_activation_and_what_is_made_of_it_follow_their_producer() -> None:
    model = Squeezed()
    found = places(model, "*", lambda: model(IMAGES))
    assert found == {"conv": (1, 8), "gate": (-1, 8), "head": (-1, 3), "act": (1, 8), "tokens": (-1, 8)}


def test_convnext_whose_linear_layers_see_images_with_channels_last() -> None:
    sizes = [8, 16, 24, 32]
    model = hf.ConvNextModel(hf.ConvNextConfig(hidden_sizes=sizes, depths=[1, 1, 1, 1]))
    layers = [f"encoder.stages.{stage}.layers.0" for stage in range(4)]
    expected: dict[str, Places] = {
        "mlp_hidden": {f"{layer}.pwconv1": (-1, 4 * size) for layer, size in zip(layers, sizes, strict=True)},
        "residual": {layer: (1, size) for layer, size in zip(layers, sizes, strict=True)},
        "*.dwconv": {f"{layer}.dwconv": (1, size) for layer, size in zip(layers, sizes, strict=True)},
        "*.0.layernorm": {f"{layer}.layernorm": (-1, size) for layer, size in zip(layers, sizes, strict=True)},
        "*.act": {f"{layer}.act": (-1, 4 * size) for layer, size in zip(layers, sizes, strict=True)},
    }
    for match, sites in expected.items():
        assert places(model, match, lambda: model(IMAGES)) == sites
    stem = places(model, "*embeddings.layernorm", lambda: model(IMAGES))
    assert list(stem.values()) == [(1, 8)], "a layer norm over the channels of an image that has them first"


@pytest.mark.parametrize("name", ["vit", "swin", "conformer"])
def test_other_models_of_transformers(name: str) -> None:
    conv = {"conv_dim": (8, 8), "conv_stride": (5, 5), "conv_kernel": (10, 5), "num_feat_extract_layers": 2}
    rest = {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2, "mask_time_prob": 0.0}
    made: dict[str, tuple[Callable[[], nn.Module], Tensor, str, int, int]] = {
        "vit": (lambda: hf.ViTModel(hf.ViTConfig(**SMALL, image_size=32, patch_size=8)), IMAGES, "projection", 16, 24),
        "swin": (
            lambda: hf.SwinModel(hf.SwinConfig(image_size=32, embed_dim=8, depths=[2], num_heads=[2], window_size=4)),
            IMAGES,
            "projection",
            8,
            32,
        ),
        "conformer": (
            lambda: hf.Wav2Vec2ConformerModel(hf.Wav2Vec2ConformerConfig(**SMALL, **conv, **rest)),
            torch.randn(2, 400),
            "conv_layers.?.conv",
            16,
            24,
        ),
    }
    make, inputs, first, width, hidden = made[name]
    model = make()
    assert set(places(model, "residual", lambda: model(inputs)).values()) == {(-1, width)}
    assert set(places(model, "mlp_hidden", lambda: model(inputs)).values()) == {(-1, hidden)}
    assert {dim for dim, _ in places(model, f"*.{first}", lambda: model(inputs)).values()} == {1}


def test_an_ordinary_convolutional_network_has_its_channels_first() -> None:
    model = build("cnn_group")
    found = places(model, "*", lambda: model(batch("cnn_group")[0]))
    assert found["stem"] == (1, 4) and found["stages.1.blocks.0"] == (1, 6) and found["head"] == (-1, 3)


def test_features_on_another_axis_are_refused_in_words() -> None:
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.turned = nn.Linear(6, 6), nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            return self.turned(self.fc(x).movedim(-1, 2))

    model = Turned()
    with pytest.raises(UserError, match=r"'turned' cannot carry seeds: its features lie on axis 2 of its output \[4, 5, 6, 7\]"):
        find_sites(model, ["turned"], 1, lambda: model(torch.randn(4, 5, 7, 6)))


def test_seeds_on_images_with_channels_last_grow_and_export_for_any_size_of_image() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 6), Lasting(), nn.Linear(6, 3))
    port = Notebook({1: [germinate("1.fc1", 1)]})

    def loss(given: nn.Module, data: Any) -> Tensor:
        return functional.cross_entropy(given(data).mean((1, 2)), data.mean((1, 2)).argmax(1), reduction="none")

    images = torch.randn(16, 4, 5, 3)
    grow = attach(
        model, loss=loss, judge=[images], sites="mlp_hidden", per_site=2, total_steps=100, lifecycle=short(), port=port, blueprint="mlp"
    )
    for _ in range(9):
        loss(model, images).mean().backward()
        grow.after_backward(images)
        grow.tick(1.0)
    assert grow.registry.branches.alpha[0] > 0 and grow.registry.sites[0].geometry.bounds(1) == (5, 10)
    with torch.no_grad():
        other = torch.randn(2, 7, 3, 3)
        torch.testing.assert_close(grow.export()(other), model(other))
