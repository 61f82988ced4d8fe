"""``scripts/bench <name> [arguments]``: calls ``main(arguments)`` of the module ``scripts/benchmarks/<name>.py``."""

from __future__ import annotations

import ast
import importlib
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent


def benchmarks() -> dict[str, str]:
    """Name → first line of its docstring, of every module here that has a ``main``; nothing is imported."""
    found = {}
    for path in sorted(FOLDER.glob("[!_]*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body):
            found[path.stem] = (ast.get_docstring(tree) or "").split("\n")[0]
    return found


def main(arguments: list[str]) -> int:
    """Run one benchmark, or list them; the exit code is the benchmark's (1: a limit was missed), 2 for an unknown name."""
    from esper.errors import UserError

    known = benchmarks()
    if not arguments or arguments[0] in ("-h", "--help"):
        print("scripts/bench <name> [arguments]; <name> --help lists its arguments\n")
        for name, text in known.items():
            print(f"  {name:14} {text}")
        return 0
    name, *rest = arguments
    if name not in known:
        print(f"There is no benchmark '{name}'; there are {', '.join(known)}.", file=sys.stderr)
        return 2
    try:
        return int(importlib.import_module(f"scripts.benchmarks.{name}").main(rest) or 0)
    except UserError as error:
        print(f"scripts/bench {name}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
