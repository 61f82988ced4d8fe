"""The callbacks are small: what they need of esper is in the library, for a loop of anybody's own."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.mark.parametrize("name", ["lightning", "transformers"])
def test_a_callback_is_at_most_80_lines_over_the_library(checkout: Path, name: str) -> None:
    assert len((checkout / "esper" / "integrations" / f"{name}.py").read_text(encoding="utf-8").splitlines()) <= 80
