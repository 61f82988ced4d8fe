"""The list of mutants, read from ``mutants.toml``."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path

LIST = Path(__file__).with_name("mutants.toml")


@dataclass(frozen=True)
class Mutant:
    """One change of one line; ``mutants.toml`` says what the fields mean."""

    name: str
    room: str
    line: str
    becomes: str
    tests: list[str]

    def path(self, root: Path) -> Path:
        """The one file that holds the line. Raises ValueError where it is in none, or twice."""
        files = [(path, path.read_text(encoding="utf-8").count(self.line)) for path in (root / "esper" / self.room).rglob("*.py")]
        holding = [path for path, count in files if count]
        if sum(count for _, count in files) != 1:
            raise ValueError(f"'{self.name}': the line is to stand once in esper/{self.room}, and is in {[path.name for path in holding]}")
        return holding[0]

    def applied(self, text: str) -> str:
        """The file's text with the mutant's line."""
        return text.replace(self.line, self.becomes)

    def test_files(self, root: Path) -> list[str]:
        """Paths of the test files. Raises ValueError for a name that no test file has."""
        found = {name: sorted((root / "tests").rglob(name)) for name in self.tests}
        if missing := [name for name, paths in found.items() if not paths]:
            raise ValueError(f"'{self.name}': there is no test file {', '.join(missing)}")
        return [str(path) for paths in found.values() for path in paths]


def mutants() -> list[Mutant]:
    """All of them, in the order of the list."""
    return [Mutant(**entry) for entry in tomllib.loads(LIST.read_text(encoding="utf-8"))["mutant"]]
