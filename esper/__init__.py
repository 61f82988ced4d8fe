"""esper trains neural networks that grow while they train, and proves whether growing paid."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from esper.saved import load_model
    from esper.training import Grow, attach

__version__ = "0.1.0"
__all__ = ["Grow", "attach", "load_model"]

_WHERE = {"attach": "esper.training", "Grow": "esper.training", "load_model": "esper.saved"}


def __getattr__(name: str) -> Any:
    """``from esper import attach`` imports torch only then: the command line's help does not wait for it."""
    if name not in _WHERE:
        raise AttributeError(f"module 'esper' has no attribute '{name}'")
    import importlib

    return getattr(importlib.import_module(_WHERE[name]), name)
