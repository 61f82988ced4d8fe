"""The list of mutants fits the code; making them is not part of the suite (scripts/mutants)."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts.mutation.mutants import Mutant, mutants


def test_there_are_thirty_and_their_names_differ() -> None:
    assert len({mutant.name for mutant in mutants()}) == len(mutants()) >= 30


@pytest.mark.parametrize("mutant", mutants(), ids=lambda mutant: mutant.name)
def test_a_mutant_stands_once_and_is_another_program(mutant: Mutant, checkout: Path) -> None:
    path = mutant.path(checkout)
    original = path.read_text(encoding="utf-8")
    assert compile(mutant.applied(original), path.name, "exec") != compile(original, path.name, "exec")
    assert mutant.test_files(checkout)
