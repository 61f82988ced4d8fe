"""What controllers that learn see of seeds and sites: features between -1 and 1, of all of them at once."""

from __future__ import annotations

from typing import Any

import numpy as np

from esper.bus.telemetry_codec import unpack
from esper.controllers.health import Health
from esper.controllers.places import Places
from esper.messages import Telemetry

SEED_FEATURES = ("quiet", "near zero", "correlation")
SITE_FEATURES = ("site variance", "site near zero", "site correlation", "site gradient", "depth", "log width")
DIGITS = 4
"""Decimals of features, which explanations show."""
_DECAY = 0.9


class Senses:
    """``look`` gathers the features of every seed, ``seed`` ``[seeds, 3]``, and of every site, ``site`` ``[sites, 6]``.

    ``known`` bool ``[seeds]`` are the seeds with sound telemetry, ``first`` ``[sites]`` is where each site's seeds begin.
    """

    def __init__(self) -> None:
        self._gradients: dict[str, float] = {}

    def begin(self, sites: list[dict[str, Any]]) -> None:
        """The run's sites."""
        count = len(sites)
        self._fixed = np.array([[number / max(1, count - 1), np.log2(max(1, site["width"])) / 10.0] for number, site in enumerate(sites)])

    def hear(self, message: Telemetry) -> None:
        """The mean gradient norm of a site's seeds."""
        if "grad_norm" not in message.columns:
            return
        column = unpack(message)[-1, :, message.columns.index("grad_norm")]
        known = column[np.isfinite(column)]
        if known.size:
            value = float(known.mean())
            self._gradients[message.site] = _DECAY * self._gradients.get(message.site, value) + (1.0 - _DECAY) * value

    def look(self, health: Health, places: Places) -> None:
        """Gather the present features of every seed and site."""
        means = [health.means(name, int(count)) for name, count in zip(places.names, np.diff(places.first), strict=True)]
        whole = np.concatenate(means) if means else np.zeros((0, 3))
        variance, near_zero, correlation = whole.T
        first, sizes = places.first[:-1], np.diff(places.first)
        known = np.isfinite(variance)
        counts = np.maximum(1, np.add.reduceat(known, first, dtype=float))
        filled = np.where(known[:, None], np.abs(whole), 0.0)
        by_site = np.add.reduceat(filled, first) / counts[:, None]
        usual = np.repeat(by_site[:, 0], sizes)
        with np.errstate(invalid="ignore", divide="ignore"):
            quiet = np.where(usual > 0.0, 1.0 / (1.0 + variance / usual), 1.0)
        self.seed = np.nan_to_num(np.column_stack([quiet, near_zero, np.abs(correlation)])).round(DIGITS)
        gradients = np.array([self._gradients.get(name, np.nan) for name in places.names])
        relative = np.column_stack([_relative(by_site[:, 0]), by_site[:, 1], by_site[:, 2], _relative(gradients)])
        self.site = np.column_stack([relative, self._fixed]).round(DIGITS)
        self.known, self.first = known, first

    def state(self) -> dict[str, Any]:
        """JSON-able."""
        return {"gradients": self._gradients}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from ``state``."""
        self._gradients = dict(state["gradients"])


def _relative(values: np.ndarray) -> np.ndarray:
    """``log(value / geometric mean)``, a third of it, within ±1; 0 where a value is missing or not positive."""
    known = np.isfinite(values) & (values > 0.0)
    logs = np.log(np.where(known, values, 1.0))
    middle = logs[known].mean() if known.any() else 0.0
    return np.where(known, np.clip((logs - middle) / 3.0, -1.0, 1.0), 0.0)
