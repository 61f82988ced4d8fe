"""The rooms of esper import one way, and no files of a room import each other in a circle: read from the source, nothing is run."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import esper

ROOT = Path(esper.__file__).parent

FOUNDATION = {
    "",
    "atomic_files",
    "errors",
    "feature_flags",
    "lazy_imports",
    "messages",
    "randomness",
    "setting_fields",
    "telemetry_columns",
}
"""Modules that every room may import; "" is the package itself, for its version."""
MODEL = {"lifecycle", "grafting", "blueprints", "kernels"}
MAY_IMPORT: dict[str, set[str]] = {
    "lifecycle": set(),
    "grafting": set(),
    "blueprints": set(),
    "kernels": set(),
    "checkpoint": {"distributed"},
    "distributed": set(),
    "seeds": {"distributed", *MODEL},
    "engine": {"seeds", "checkpoint", "distributed", *MODEL},
    "trainer": {"engine", "seeds", "checkpoint", "distributed", "tasks", *MODEL},
}
"""The rooms below running and the command line, and the other rooms that each may import."""
WHERE_USED: dict[str, set[str]] = {
    "engine": {"bus", "controllers", "export"},
}
"""Rooms that may be imported within a function only: ``attach(controller="heuristic")`` and ``grow.save`` need them, no other user does."""
WITHOUT_CIRCLES = ("engine", "trainer", "checkpoint", "distributed", "lifecycle", "grafting", "blueprints", "kernels")


def module_of(path: Path) -> str:
    """Dotted name below ``esper``: ``engine.tick`` for ``esper/engine/tick.py``, ``engine`` for its ``__init__.py``."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in sorted(ROOT.rglob("*.py"))}


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """The modules of esper that a file imports, and whether it does so within a function; ``TYPE_CHECKING`` counts as the file's own."""
    tree = ast.parse(path.read_text())
    functions = (node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))
    inside = {id(node) for function in functions for node in ast.walk(function)}
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            if name.split(".")[0] == "esper":
                yield _existing(name.removeprefix("esper").lstrip(".")), id(node) in inside


def _existing(name: str) -> str:
    """The module that a dotted name is, or is in."""
    while name and name not in MODULES:
        name = name.rpartition(".")[0]
    return name


def room_of(module: str) -> str:
    """The first part of a dotted name."""
    return module.split(".")[0]


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_a_room_imports_only_rooms_below_it(room: str) -> None:
    wrong = []
    for module, path in MODULES.items():
        if room_of(module) != room:
            continue
        for imported, where_used in imports(path):
            allowed = {room, *FOUNDATION, *MAY_IMPORT[room], *(WHERE_USED.get(room, set()) if where_used else ())}
            if room_of(imported) not in allowed:
                wrong.append(f"{module} imports {imported}")
    assert not wrong, wrong


@pytest.mark.parametrize("room", WITHOUT_CIRCLES)
def test_no_files_of_a_room_import_each_other_in_a_circle(room: str) -> None:
    """Imports within functions and under ``TYPE_CHECKING`` count: they hide a circle and do not remove it."""
    graph = {
        module: {imported for imported, _ in imports(path) if room_of(imported) == room and imported != module}
        for module, path in MODULES.items()
        if room_of(module) == room
    }
    assert graph, f"there is no room {room}"
    circle = find_circle(graph)
    assert circle is None, " → ".join(circle)


def find_circle(graph: dict[str, set[str]]) -> list[str] | None:
    """The modules of a circle, the first one again at its end; None where there is none."""
    done: set[str] = set()

    def walk(module: str, path: list[str]) -> list[str] | None:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return None
        for imported in sorted(graph.get(module, ())):
            found = walk(imported, [*path, module])
            if found is not None:
                return found
        done.add(module)
        return None

    return next((found for module in sorted(graph) if (found := walk(module, [])) is not None), None)


def test_a_circle_would_be_found() -> None:
    assert find_circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert find_circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) is None


ORDER = ("trainer", "running", "cli", "compare", "app")
"""The rooms above the trainer, each of which uses those before it and none after it: a sweep composes its jobs as the command line does."""


@pytest.mark.parametrize("room", ORDER[:-1])
def test_the_upper_rooms_import_one_way(room: str) -> None:
    above = ORDER[ORDER.index(room) + 1 :]
    wrong = [
        f"{module} imports {imported}"
        for module, path in MODULES.items()
        if room_of(module) == room
        for imported, _ in imports(path)
        if room_of(imported) in above
    ]
    assert not wrong, wrong
