"""A/B tests as sweeps: arms paired by seed, decided by a test that was stated beforehand; and verdicts on runs of any program."""

from typing import TYPE_CHECKING

from esper.compare.config import CompareConfig
from esper.lazy_imports import names_of

if TYPE_CHECKING:
    from esper.compare.judging import Judged, judge

CONFIGS = {"default": CompareConfig}

__all__ = ["CONFIGS", "CompareConfig", "Judged", "judge"]

__getattr__ = names_of(__name__, {"judge": "esper.compare.judging", "Judged": "esper.compare.judging"})
