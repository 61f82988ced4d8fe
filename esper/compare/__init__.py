"""A/B tests as sweeps: arms paired by seed, decided by a test that was stated beforehand."""

from esper.compare.config import CompareConfig

CONFIGS = {"default": CompareConfig}

__all__ = ["CONFIGS", "CompareConfig"]
