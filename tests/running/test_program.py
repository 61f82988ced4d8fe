"""An exported program takes what its model takes: any stride, any batch size, any length where the model takes several."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from growing import batch, build
from torch import Tensor, nn

from esper.cli.export import export_pt2
from esper.errors import UserError
from esper.export.program import signature_of, to_onnx, to_pt2, traced
from esper.tracking.final_model import PROGRAM, write_model

Program = Callable[[Tensor], Tensor]


class Encoder(nn.Module):
    """torch's own encoder, which has a path of its own where nothing is learnt."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 2), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, T, 8] → [N, T, 3]``."""
        return self.head(self.encoder(x))


def tokens(*shape: int) -> Tensor:
    """Characters of a vocabulary of five."""
    return torch.randint(0, 5, shape, generator=torch.Generator().manual_seed(sum(shape)))


def numbers(*shape: int) -> Tensor:
    """Normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


#: Model, the batch it is traced with, and batches of other sizes and strides that it takes.
CASES: dict[str, tuple[Callable[[], nn.Module], Tensor, list[Tensor]]] = {
    "mlp": (lambda: build("mlp"), numbers(12, 9)[:, 2:8], [numbers(1, 6), numbers(6, 5).t(), numbers(30, 6)[::3]]),
    "transformer": (
        lambda: build("transformer"),
        batch("transformer")[0],  # a view, as the task's batches are
        [tokens(1, 1), tokens(3, 6), tokens(1, 6), tokens(7, 2), tokens(4, 3).t(), tokens(5, 7)[:, 1:]],
    ),
    "images": (
        lambda: build("cnn_batch"),
        numbers(4, 8, 8, 1).permute(0, 3, 1, 2),
        [numbers(1, 1, 8, 8), numbers(3, 1, 6, 10), numbers(2, 1, 16, 8), numbers(8, 8, 1, 3).permute(3, 2, 0, 1), numbers(2, 1, 2, 9)],
    ),
    "encoder": (Encoder, numbers(2, 5, 8), [numbers(1, 5, 8), numbers(3, 1, 8), numbers(8, 9, 3).permute(2, 1, 0)]),
}


@pytest.fixture(scope="module", params=list(CASES))
def case(request: pytest.FixtureRequest) -> Any:
    """(model, program, batches) of one case."""
    make, inputs, others = CASES[request.param]
    model = make().eval()
    program, remarks = traced(model, inputs)
    assert remarks == [] and not model._forward_pre_hooks
    return model, program, others


def same(program: Program, model: nn.Module, others: list[Tensor]) -> None:
    """Assert that both give the same for every batch."""
    for x in others:
        with torch.no_grad():
            torch.testing.assert_close(program(x), model(x), rtol=1e-4, atol=1e-5)


def test_a_pt2_takes_every_stride_batch_and_length(case: Any, tmp_path: Path) -> None:
    model, program, others = case
    same(torch.export.load(to_pt2(program, tmp_path / "model.pt2")).module(), model, others)


@pytest.mark.usefixtures("heavy_libraries")
def test_an_onnx_graph_takes_every_batch_and_length(case: Any, tmp_path: Path) -> None:
    import onnxruntime

    model, program, others = case
    session = onnxruntime.InferenceSession(to_onnx(program, tmp_path / "model.onnx"))
    same(lambda x: torch.from_numpy(session.run(None, {"inputs": x.contiguous().numpy()})[0]), model, others)


def test_what_a_run_leaves_for_its_tracker_takes_a_batch_of_one_and_other_lengths(tmp_path: Path) -> None:
    model, inputs, others = CASES["transformer"]
    host = model()
    write_model(host, inputs[:1], tmp_path)
    program = torch.export.load(tmp_path / PROGRAM)
    described = signature_of(program)
    assert [side["shape"] for side in described["inputs"] + described["outputs"]] == [[-1, -1], [-1, -1, 5]]
    same(program.module(), host.eval(), others)


class Recurrent(nn.Module):
    """torch.export unrolls a recurrence."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(6, 7, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, T, 6] → [N, T, 7]``."""
        output: Tensor = self.rnn(x)[0]
        return output


def test_a_size_that_torch_fixes_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        export_pt2(Recurrent().eval(), numbers(2, 5, 6), tmp_path / "model.pt2")
    said = capsys.readouterr().err
    words = "the program takes only inputs whose size along axis 1 is 5, though the model takes others: torch.export fixes it"
    assert said == f"esper: {words}\n"


def test_a_model_that_cannot_be_followed_gets_a_sentence(tmp_path: Path) -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * float(x.sum().item() > 0.0 and x.numpy().mean())

    with pytest.raises(UserError, match=r"cannot be exported by torch\.export \(.*\); format=safetensors does without"):
        export_pt2(Odd(), numbers(2, 3), tmp_path / "model.pt2")
    assert list(tmp_path.iterdir()) == []


def test_a_link_in_the_way_is_replaced_and_what_it_leads_to_stays(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("mine", encoding="utf-8")
    (tmp_path / "model.pt2").symlink_to(precious)
    export_pt2(build("mlp").eval(), numbers(2, 6), tmp_path / "model.pt2")
    assert precious.read_text(encoding="utf-8") == "mine" and not (tmp_path / "model.pt2").is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.pt2", "precious"]


QUIET = """
import torch
from pathlib import Path
from esper.cli.export import export_onnx, export_pt2
model, x = torch.nn.LSTM(6, 7, batch_first=True), torch.randn(2, 5, 6)
export_pt2(model.eval(), x, Path("model.pt2"))
export_onnx(torch.nn.Linear(6, 3), x, Path("model.onnx"))
"""


@pytest.mark.usefixtures("processes")
def test_exporting_prints_nothing_of_torchs(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", QUIET], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "" and [line for line in done.stderr.splitlines() if not line.startswith("esper: ")] == []
