"""A run that is interrupted ends cleanly: the exit code that the shell expects, one sentence, and what it had so far."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from esper.__main__ import run


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("number", "words", "code", "sentence"),
    [
        (signal.SIGINT, [], 130, "esper: ended by Ctrl-C; what there is so far lies in "),
        (signal.SIGTERM, [], 75, "esper: ended by SIGTERM, everything is saved: esper resume="),
        (signal.SIGTERM, ["trainer.checkpoint_every="], 143, "esper: ended by SIGTERM; what there is so far lies in "),
    ],
)
def test_an_interrupted_run_ends_cleanly(
    number: int, words: list[str], code: int, sentence: str, tmp_path: Path, interrupted: Callable[..., tuple[int, str]]
) -> None:
    words = ["debug=tiny", "trainer.steps=100000", "hydra/launcher=basic", "output=kept", *words]
    ended, rest = interrupted(words, b"/100000", number)  # the progress bar: training has begun
    assert ended == code
    (log,) = (tmp_path / "kept").glob("*/*/esper.log")
    last = rest.splitlines()[-1]
    assert last.startswith(sentence) and str(log.parent) in last
    assert "Traceback" not in rest


def test_so_does_one_that_is_interrupted_while_it_is_imported(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    class Interrupted:
        def find_spec(self, name: str, *_: Any) -> None:
            if name == "esper.app":
                raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, "esper.app", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Interrupted(), *sys.meta_path])
    assert run() == 130 and capsys.readouterr().err == "esper: ended by Ctrl-C\n"
