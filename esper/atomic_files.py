"""Files that appear whole or not at all, and never through a link that lies in their place."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Within: the place to write the file that becomes ``path`` in the end; after an exception, ``path`` is unchanged.

    It is written in a new folder beside it, whose name cannot be known beforehand, and renamed: a link called ``path`` is replaced,
    and the file that it leads to stays unchanged.
    """
    aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield aside / path.name
        os.replace(aside / path.name, path)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
