"""Example hosts (config group ``model``).

A host names its ``growth_sites`` and, if it has residual blocks, its ``growth_blocks``.
"""

from esper.hosts.config import CONFIGS

__all__ = ["CONFIGS"]
