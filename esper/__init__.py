"""esper trains neural networks that grow while they train, and proves whether growing paid."""

from typing import TYPE_CHECKING

from esper.lazy import names_of

if TYPE_CHECKING:
    from esper.saved import load_model
    from esper.training.attach import attach
    from esper.training.grow import Grow

__version__ = "0.1.0"
__all__ = ["Grow", "attach", "load_model"]

__getattr__ = names_of(__name__, {"attach": "esper.training.attach", "Grow": "esper.training.grow", "load_model": "esper.saved"})
