"""``learned``: for every seed the strategy that has paid before, chosen beside the controller (``esper/controllers/learned_grafting.py``).

The engine sees this strategy itself only of a branch for which nobody has chosen another: it then climbs as ``linear``.
"""

from __future__ import annotations

from esper.grafting.base import Strategy
from esper.grafting.config import LearnedConfig
from esper.grafting.linear import plan

LEARNED = Strategy("learned", LearnedConfig, (), plan)
