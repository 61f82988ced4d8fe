"""The programs of `experiments/`, as modules for their tests."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType


def study(checkout: Path, name: str) -> ModuleType:
    """A study's program as a module."""
    spec = importlib.util.spec_from_file_location(f"study_{name}", checkout / "experiments" / name / "run.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
