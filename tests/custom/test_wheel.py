"""What the wheel ships besides the code."""

from __future__ import annotations

from email.parser import Parser
from pathlib import Path


def test_the_wheel_declares_its_types_its_licence_and_a_name_that_is_free(installed: Path) -> None:
    (folder,) = installed.glob("*.dist-info")
    metadata = Parser().parsestr((folder / "METADATA").read_text())
    assert (metadata["Name"], metadata["License-Expression"]) == ("esper-grow", "MIT")
    assert (folder / "licenses" / "LICENSE").read_text().startswith("MIT License")
    assert (installed / "esper" / "py.typed").exists()
