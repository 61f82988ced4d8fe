"""A run that is interrupted ends cleanly: the exit code that the shell expects, one sentence, and what it had so far."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest


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
    number: int, words: list[str], code: int, sentence: str, tmp_path: Path, checkout: Path
) -> None:
    words = ["debug=tiny", "trainer.steps=100000", "hydra/launcher=basic", "output=kept", *words]
    process = subprocess.Popen(
        [sys.executable, "-m", "esper", *words],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(checkout)},
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores it
    )
    assert process.stderr is not None
    shown = b""
    while b"/100000" not in shown:  # the progress bar: training has begun
        chunk = os.read(process.stderr.fileno(), 4096)
        assert chunk, shown.decode()
        shown += chunk
    process.send_signal(number)
    _, rest = process.communicate(timeout=60)
    assert process.returncode == code
    (log,) = (tmp_path / "kept").glob("*/*/esper.log")
    last = rest.decode().splitlines()[-1]
    assert last.startswith(sentence) and str(log.parent) in last
    assert "Traceback" not in rest.decode()
