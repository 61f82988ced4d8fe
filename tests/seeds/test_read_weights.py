"""What reads a layer's weights instead of calling it loses no branch, in the live model or any export; or is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from growing import Notebook, germinate, short
from torch import Tensor, nn
from torch.nn import functional

from esper import attach, load_model
from esper.blueprints import Block
from esper.engine.grow import Grow
from esper.errors import UserError
from esper.export.program import to_onnx, to_pt2, traced
from esper.seeds import find_sites

WIDTH, LENGTH = 8, 5
X = torch.randn(6, LENGTH, WIDTH, generator=torch.Generator().manual_seed(0))
LENGTHS = torch.tensor([5, 3, 5, 4, 2, 5])


class Encoded(nn.Module):
    """torch's encoder, whose layers have a path that reads weights; padded, it nests its sequences besides."""

    def __init__(self, padded: bool = False) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, dropout=0.0, batch_first=True)
        self.padded, self.encoder, self.head = padded, nn.TransformerEncoder(layer, 2), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, T, 8] → [N, 3]``."""
        padding = (x[:, :, 0] > 1e3) if self.padded else None
        hidden = self.encoder(x, src_key_padding_mask=padding)
        return self.head(hidden[:, 0])


class Recurrent(nn.Module):
    """A recurrence over packed sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.LSTM(WIDTH, WIDTH, batch_first=True), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, T, 8] → [N, 3]``."""
        packed = nn.utils.rnn.pack_padded_sequence(x, LENGTHS[: len(x)], batch_first=True, enforce_sorted=False)
        hidden, _ = nn.utils.rnn.pad_packed_sequence(self.rnn(packed)[0], batch_first=True)
        return self.head(hidden.sum(1))


@dataclass
class Case:
    """A model and the module in it on which something grows."""

    make: Callable[[], nn.Module]
    site: str
    blueprint: Any = "mlp"


def padded() -> nn.Module:
    """The encoder with a mask."""
    return Encoded(padded=True)


SITES = ("linear1", "linear2", "self_attn", "norm1", "dropout1", "dropout2", "dropout")
CASES = {site: Case(Encoded, f"encoder.layers.0.{site}") for site in SITES}
CASES |= {f"padded-{site}": Case(padded, f"encoder.layers.0.{site}") for site in ("linear2", "self_attn", "dropout")}
CASES |= {
    "layer": Case(Encoded, "encoder.layers.0"),
    "padded-layer": Case(padded, "encoder.layers.1"),
    "block": Case(Encoded, "encoder.layers.0", Block(start="copy")),
    "padded-block": Case(padded, "encoder.layers.0", Block(start="copy")),
    "low_rank": Case(Encoded, "encoder.layers.1.linear2", "low_rank"),
}


def inputs(case: str) -> Tensor:
    """The batch; padded positions hold a number that the model takes for padding."""
    x = X.clone()
    if case.startswith("padded"):
        for row, length in enumerate(LENGTHS):
            x[row, length:] = 1e4
    return x


def loss(model: nn.Module, data: Any) -> Tensor:
    """Cross-entropy of every sample."""
    return functional.cross_entropy(model(data[0]), data[1], reduction="none")


def grown(case: str) -> tuple[nn.Module, Grow, Tensor]:
    """A model on which something grew, its handle and its batch."""
    told = CASES[case]
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = told.make()
    x = inputs(case)
    data = (x, torch.arange(len(x)) % 3)
    settings: dict[str, Any] = {"per_site": 1, "total_steps": 100, "lifecycle": short(), "blueprint": told.blueprint}
    port = Notebook({1: [germinate(told.site)]})
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    grow = attach(model, loss=loss, judge=[data], sites=[told.site], optimizer=optimizer, port=port, **settings)
    for _ in range(9):
        loss(model, data).mean().backward()
        grow.after_backward(data)
        optimizer.step()
        grow.tick(1.0)
        optimizer.zero_grad()
    assert grow.registry.branches.alpha[0] > 0
    return model, grow, x


def modes() -> Iterator[tuple[bool, AbstractContextManager[Any]]]:
    """Training or not, with gradients, without, and in inference mode."""
    for training in (True, False):
        yield training, nullcontext()
        yield training, torch.no_grad()
        yield training, torch.inference_mode()


@pytest.mark.parametrize("case", list(CASES))
def test_what_grew_is_felt_everywhere_and_in_every_mode(case: str, tmp_path: Path) -> None:
    model, grow, x = grown(case)
    plain = grow.export()
    grow.save(tmp_path)
    with torch.random.fork_rng():
        loaded = load_model(tmp_path, CASES[case].make())
    expected = model.train()(x).detach()  # with gradients and in training, torch takes no path of its own
    with grow.registry.without(*grow.registry.branches.living()):
        assert (model(x) - expected).abs().max() > 1e-3, "what grew is felt"
    for name, one in (("live", model), ("exported", plain), ("loaded", loaded)):
        for training, context in modes():
            one.train(training)
            with context:
                torch.testing.assert_close(one(x).clone(), expected, rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.usefixtures("heavy_libraries")
@pytest.mark.parametrize("case", ["linear2", "padded-dropout", "block"])
def test_what_grew_is_in_the_programs(case: str, tmp_path: Path) -> None:
    import onnxruntime

    model, grow, x = grown(case)
    program, remarks = traced(grow.export().eval(), x)
    assert remarks == []
    with torch.no_grad():
        expected = model.eval()(x)
        given = torch.export.load(to_pt2(program, tmp_path / "model.pt2")).module()(x)
    torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-5)
    session = onnxruntime.InferenceSession(to_onnx(program, tmp_path / "model.onnx"))
    torch.testing.assert_close(torch.from_numpy(session.run(None, {"inputs": x.numpy()})[0]), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", ["linear2", "padded-linear2"])
def test_dormant_seeds_change_no_bit_of_an_encoder(case: str) -> None:
    told = CASES[case]
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = told.make().eval()
    x = inputs(case)
    fast = torch.backends.mha.get_fastpath_enabled()
    before = model(x).detach()
    attach(model, loss=loss, total_steps=100, sample=(x, torch.arange(len(x)) % 3), sites=[told.site], per_site=1)
    assert torch.equal(model(x), before) and torch.backends.mha.get_fastpath_enabled() is fast


def test_a_layer_that_is_never_called_is_refused() -> None:
    model = Encoded()
    words = r"'encoder\.layers\.0\.self_attn\.out_proj' cannot carry seeds: MultiheadAttention reads its weights and never calls it"
    with pytest.raises(UserError, match=words):
        find_sites(model, ["*.out_proj"], 1, lambda: model(X))


def test_a_recurrence_over_packed_sequences_is_refused() -> None:
    model = Recurrent()
    with pytest.raises(UserError, match=r"^The module 'rnn' cannot carry seeds: it gives no tensor when the host runs"):
        find_sites(model, ["rnn"], 1, lambda: model(X))


class Attending(nn.Module):
    """Attention, a layer whose weights a function reads, one that nobody needs, and a head that is not the last of its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.attention = nn.Linear(WIDTH, WIDTH), nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.read, self.head, self.unused = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, T, 8] → [N, 3]``."""
        x = self.fc(x)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(functional.linear(x, self.read.weight).mean(1))


def test_auto_leaves_out_what_cannot_carry_seeds_and_says_what(caplog: pytest.LogCaptureFixture) -> None:
    model = Attending()
    assert [site.name for site in find_sites(model, ["auto"], 1, lambda: model(X))] == ["fc"]
    assert caplog.messages == [
        "sites.match=auto leaves out 'attention.out_proj': MultiheadAttention reads its weights and never calls it, "
        "so what grew there would not be felt",
        "sites.match=auto leaves out 'read': the host reads its weights and never calls it, so what grew there would not be felt",
        "sites.match=auto leaves out 'unused': it is not called when the host runs",
    ]


def test_auto_that_finds_nothing_says_why() -> None:
    class Read(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.read, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(functional.linear(x, self.read.weight))

    model = Read()
    with pytest.raises(UserError, match=r"auto finds no hidden layer in this host \('read': the host reads its weights and never calls it"):
        find_sites(model, ["auto"], 1, lambda: model(X))


def test_a_model_with_attention_grows_with_sites_auto() -> None:
    model = Attending()
    data = (X, torch.arange(len(X)) % 3)
    grow = attach(model, loss=loss, judge=[data], total_steps=100, per_site=1, controller="heuristic")
    loss(model, data).mean().backward()
    grow.after_backward(data)
    grow.tick(1.0)
    assert [site.name for site in grow.registry.sites] == ["fc"]
