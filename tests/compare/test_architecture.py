"""The packages of ``esper.compare`` depend on each other in one direction, and no import runs in a circle."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = "esper.compare"
#: What each package within may import besides itself and the settings.
BELOW = {
    "statistics": set(),
    "results": {"statistics"},
    "sources": {"statistics", "results"},
    "sweep": {"statistics", "results"},
    "search": {"statistics", "results", "sweep"},
}


def imports(root: Path) -> dict[str, set[str]]:
    """For every module of the package the modules of it that it imports, also for types alone and within functions."""
    modules = {".".join((PACKAGE, *path.relative_to(root).with_suffix("").parts)): path for path in root.rglob("*.py")}
    found: dict[str, set[str]] = {}
    for name, path in modules.items():
        named: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module:
                named |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
            elif isinstance(node, ast.Import):
                named |= {alias.name for alias in node.names}
        found[name] = named & modules.keys() - {name}
    return found


def test_no_import_runs_in_a_circle(checkout: Path) -> None:
    found = imports(checkout / "esper" / "compare")
    assert sum(map(len, found.values())) > len(found), "the imports are seen"
    order = list(TopologicalSorter(found).static_order())
    assert set(order) == set(found)


def test_an_import_for_types_alone_closes_a_circle_too(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from esper.compare.b import B\n")
    (tmp_path / "b.py").write_text("def late():\n    from esper.compare import a\n")
    with pytest.raises(CycleError):
        TopologicalSorter(imports(tmp_path)).prepare()


@pytest.mark.parametrize("part", BELOW)
def test_statistics_know_no_sweep_and_results_are_judged_without_running_one(part: str, checkout: Path) -> None:
    allowed = {f"{PACKAGE}.{name}" for name in ("config", part, *BELOW[part])}
    for module, needed in imports(checkout / "esper" / "compare").items():
        if module.startswith(f"{PACKAGE}.{part}."):
            assert {name for name in needed if not name.startswith(tuple(allowed))} == set(), module


def test_no_file_is_longer_than_a_reader_can_hold(checkout: Path) -> None:
    lengths = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in (checkout / "esper" / "compare").rglob("*.py")}
    assert {name: length for name, length in lengths.items() if length > 400} == {}
