"""One configuration, one fingerprint, whatever does not belong to the computation."""

from __future__ import annotations

from pathlib import Path

import pytest

from esper.compare.fingerprint import explain, same_bits
from esper.compare.fingerprint import main as compare
from esper.report.summary import read_summary
from esper.running.run import run
from tests.resume.conftest import Configure

AXES = {
    "again": (),
    "loader processes": ("trainer.num_workers=4",),
    "tracking off": ("tracking=none",),
    "a server as bus": ("bus=embedded",),
    "no checkpoints": ("trainer.checkpoint_every=''",),
    "no governor": ("trainer.governor=false",),
}


@pytest.mark.parametrize("words", AXES.values(), ids=AXES.keys())
def test_the_bits_do_not_depend_on(words: tuple[str, ...], configure: Configure, finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "day" / "run"
    run(configure(*words, f"output={tmp_path}"), folder, quiet=True)
    assert read_summary(folder)["seeds"]["germinated"] > 0
    assert same_bits(folder, finished)


def test_the_first_difference_is_named(configure: Configure, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "day" / "run"
    run(configure("optimizer.lr=0.0031", f"output={tmp_path}"), folder, quiet=True)
    kinds = {difference.kind: difference.text for difference in explain(finished, folder)}
    assert "optimizer.lr is 0.003 and 0.0031" in kinds["config"]
    assert "at tick 5" in kinds["step"] and kinds["weights"].startswith("equal at step 0")
    assert compare([str(finished), str(folder)]) == 1
    assert "not the same bits" in capsys.readouterr().out
    assert compare([str(finished), str(finished)]) == 0
    assert "same bits: " in capsys.readouterr().out
