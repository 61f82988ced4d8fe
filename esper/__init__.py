"""esper trains neural networks that grow while they train, and proves whether growing paid."""

from typing import TYPE_CHECKING

from esper.lazy_imports import names_of

if TYPE_CHECKING:
    from esper.engine.attach import attach
    from esper.engine.grow import Grow
    from esper.export.saved_model import load_model
    from esper.inventory.saved_run import SavedRun, load_run

__version__ = "0.1.0"
__all__ = ["Grow", "SavedRun", "attach", "load_model", "load_run"]

__getattr__ = names_of(
    __name__,
    {
        "attach": "esper.engine.attach",
        "Grow": "esper.engine.grow",
        "load_model": "esper.export.saved_model",
        "SavedRun": "esper.inventory.saved_run",
        "load_run": "esper.inventory.saved_run",
    },
)
