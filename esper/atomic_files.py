"""Files that appear whole or not at all, and never through a link that somebody has put where they go."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Within: where to write what becomes ``path`` in the end; after an exception, ``path`` is what it was.

    It is written in a new folder beside it, whose name nobody can know beforehand, and renamed: a link called ``path`` is replaced,
    and what it leads to stays as it is.
    """
    aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield aside / path.name
        os.replace(aside / path.name, path)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
