"""Makes each mutant of the list in a copy of the checkout, runs its tests there, and says whether quick or the whole suite notices."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path

# Imported once, for all the processes forked below:
import hypothesis  # noqa: F401
import numpy as np  # noqa: F401
import pytest
import scipy.stats  # noqa: F401
import torch  # noqa: F401

from scripts.mutation.mutants import Mutant, mutants

ROOT = Path(__file__).resolve().parents[2]
COPIED = ("esper", "hydra_plugins", "conf", "tests", "scripts", "docs", "experiments", ".ci")
QUICK, FULL = "not slow and not browser", "not browser"
CAUGHT = 1
"""pytest's exit code where a test failed; 0 is a survivor, and anything else a mistake in the list."""


def copy(folder: Path) -> None:
    """The checkout's files, without what was built in it."""
    for name in COPIED:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.png"))
    for file in ROOT.iterdir():
        if file.is_file():
            shutil.copy(file, folder / file.name)


def outcome(folder: Path, mutant: Mutant, marks: str) -> int:
    """pytest's exit code over the mutant's tests in a process of its own."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os.chdir(folder)
    sys.path[0] = str(folder)
    os.environ["PYTHONPATH"] = str(folder)
    sys.dont_write_bytecode = True
    quiet = os.open(folder / "pytest.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    os._exit(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-m", marks, *mutant.test_files(folder)]))


def verdict(folder: Path, mutant: Mutant) -> str:
    """``quick``, ``full`` or ``survived``; raises RuntimeError where the tests could not be run."""
    for marks, name in ((QUICK, "quick"), (FULL, "full")):
        code = outcome(folder, mutant, marks)
        if code == CAUGHT:
            return name
        if code not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            raise RuntimeError(f"pytest ended with {code}:\n{(folder / 'pytest.log').read_text()}")
    return "survived"


def main(words: list[str]) -> int:
    """Every mutant whose name holds all the words."""
    survived = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        copy(folder)
        for mutant in mutants():
            if not all(word in mutant.name for word in words):
                continue
            path = mutant.path(folder)
            original = path.read_text(encoding="utf-8")
            path.write_text(mutant.applied(original), encoding="utf-8")
            found = verdict(folder, mutant)
            path.write_text(original, encoding="utf-8")
            survived += found == "survived"
            print(f"{found:9}{mutant.room:12}{mutant.name}", flush=True)
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
