"""``policy``: a small network, learnt from recorded runs by ``esper learn``, decides behind fixed rules."""

from __future__ import annotations

from esper.controllers.policy.config import PolicyConfig

__all__ = ["PolicyConfig"]
