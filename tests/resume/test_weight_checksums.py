"""What the weights come to is noted at every look at the validation set, and tells where two runs part."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from esper.checkpoint import disk
from esper.compare.fingerprint import explain
from esper.running.callbacks import WEIGHTS, WeightChecksums, checksum, read_checksums
from esper.running.run import run
from esper.trainer.trainer import Trainer
from tests.resume.conftest import Configure, copied


def weights(first: Path, second: Path) -> list[str]:
    return [difference.text for difference in explain(first, second) if difference.kind == "weights"]


def flipping(step: int) -> object:
    """A training whose weights have one bit flipped after this many steps."""
    advance = Trainer.advance

    def flips(self: Trainer) -> None:
        advance(self)
        if self.outcome.steps == step:
            self.optimizer.param_groups[0]["params"][0].detach().view(torch.int32)[0, 0] ^= 1

    return flips


def test_one_flipped_bit_is_found_though_no_checkpoint_is_left(
    configure: Configure, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert sorted(read_checksums(finished)) == [16, 32, 48, 64, 80]
    folder = tmp_path / "day" / "run"
    monkeypatch.setattr(Trainer, "advance", flipping(37))
    run(configure(f"output={tmp_path}"), folder, quiet=True)
    shutil.rmtree(folder / disk.FOLDER)
    assert weights(finished, folder)[0] == "the first noted to differ are those after step 48; at step 32 they were equal"


def test_a_life_that_goes_on_forgets_what_was_noted_beyond_and_what_is_torn(finished: Path, tmp_path: Path) -> None:
    folder = copied(finished, tmp_path)
    whole = read_checksums(folder)
    with (folder / WEIGHTS).open("a") as file:
        file.write("96,12ab")
    assert read_checksums(folder) == whole
    WeightChecksums(folder, 48)
    assert read_checksums(folder) == {step: value for step, value in whole.items() if step <= 48}
    WeightChecksums(folder, -1)
    assert read_checksums(folder) == {} and (folder / WEIGHTS).read_text() == "step,sum\n"


def test_runs_of_before_it_was_noted_are_compared_as_they_were(configure: Configure, finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "day" / "run"
    run(configure("optimizer.lr=0.0031", f"output={tmp_path}"), folder, quiet=True)
    assert "none was noted before by both" in weights(finished, folder)[0]
    (folder / WEIGHTS).unlink()
    (text,) = weights(finished, folder)
    assert text.startswith("at step 4 the host differs")


DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.bool, torch.int64, torch.complex64, torch.complex128)


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_kind_of_tensor_is_summed_without_being_changed(dtype: torch.dtype) -> None:
    given = torch.ones(3, 4).to(dtype)
    other = given.clone()
    other[1, 2] = 0
    assert checksum([given]) == checksum([given.clone(), torch.empty(0)][:1]) != checksum([other])
    assert checksum([given.t()]) == checksum([given]) and torch.equal(given, torch.ones(3, 4).to(dtype))
    assert checksum([torch.empty(0, dtype=dtype)]) != checksum([])


def test_noting_draws_nothing_and_changes_nothing(
    configure: Configure, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(WeightChecksums, "__call__", lambda self, trainer: None)
    run(configure(f"output={tmp_path}"), tmp_path / "day" / "run", quiet=True)
    assert list(explain(finished, tmp_path / "day" / "run")) == []
