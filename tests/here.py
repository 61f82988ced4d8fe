"""Programs called in this process: starting one takes seconds, and most of what a command line says is not about processes."""

from __future__ import annotations

import io
import logging
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout

__all__ = ["called", "here", "restored"]


@contextmanager
def restored() -> Iterator[None]:
    """Afterwards the root logger, the answer to SIGTERM and ``sys.argv``, which the program sets as it likes, are as they were."""
    root, words, answer = logging.getLogger(), sys.argv, signal.getsignal(signal.SIGTERM)
    handlers, level = list(root.handlers), root.level
    try:
        yield
    finally:
        for handler in root.handlers:
            if handler not in handlers:
                handler.close()
        root.handlers[:] = handlers
        root.setLevel(level)
        sys.argv = words
        signal.signal(signal.SIGTERM, answer)


def here(*words: str) -> subprocess.CompletedProcess[str]:
    """What ``esper`` with these words would have printed and ended with as a process of its own."""
    from esper.app import main

    return called(main, *words)


def called(main: Callable[[list[str]], int], *words: str) -> subprocess.CompletedProcess[str]:
    """The same of any program."""
    out, err = io.StringIO(), io.StringIO()
    with restored(), redirect_stdout(out), redirect_stderr(err):
        try:
            code = main(list(words))
        except SystemExit as ended:
            assert isinstance(ended.code, int)
            code = ended.code
    return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())
