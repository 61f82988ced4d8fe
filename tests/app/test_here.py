"""A program called in the tests' own process says and leaves what it would as a process of its own, and no more."""

from __future__ import annotations

import logging
import signal
import sys

from tests.here import called


def test_what_a_program_does_to_its_process_ends_with_it() -> None:
    root = logging.getLogger()
    before = (list(root.handlers), root.level, signal.getsignal(signal.SIGTERM), sys.argv)

    def program(words: list[str]) -> int:
        root.addHandler(logging.StreamHandler(sys.stderr))
        root.setLevel(logging.INFO)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        sys.argv = [*words]
        print("done", *words)
        logging.info("a detail")
        raise SystemExit(3)

    ended = called(program, "a=1")
    assert (ended.returncode, ended.stdout, ended.stderr) == (3, "done a=1\n", "a detail\n")
    assert (list(root.handlers), root.level, signal.getsignal(signal.SIGTERM), sys.argv) == before
