"""CONTRIBUTING.md names files that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[2] / "CONTRIBUTING.md"
NAMED = sorted(
    set(re.findall(r"`((?:esper|conf|docs|tests|scripts|\.ci)/[\w./<>]+|\w+\.(?:md|txt|toml))`", PAGE.read_text(encoding="utf-8")))
)
CHANGES = re.findall(r"^\| (an? [^|]+|something [^|]+) \| ([^|]+) \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.parametrize("name", NAMED)
def test_a_file_named_in_contributing_exists(name: str, checkout: Path) -> None:
    known = name.partition("<name>")[0].rpartition("/")[0] if "<name>" in name else name
    assert (checkout / known).exists()


def test_the_ten_changes_take_at_most_four_files_each() -> None:
    assert len(CHANGES) == 10
    for change, files in CHANGES:
        assert 1 <= len(re.findall(r"`[\w/<>]+\.\w+`", files)) <= 4, change
