"""The health of dormant seeds, from their telemetry: how much a branch could help there."""

from __future__ import annotations

from typing import Any

import numpy as np

from esper.bus.telemetry_codec import unpack
from esper.messages import Telemetry

#: The columns a score is made of.
SCORED = ("variance", "near_zero", "correlation")
#: Weight of the past in the running mean of each column.
_DECAY = 0.9


class Health:
    """Running means of the three columns, ``[3, seeds]`` a site.

    A row with a value that is not finite forgets the seed's past: until the next good row it has no health, and so no
    score.
    """

    def __init__(self) -> None:
        self._means: dict[str, np.ndarray] = {}
        self._gaps: set[str] = set()
        """Sites some of whose seeds have no health; of all others nothing has to be asked twice, a hundred times a tick."""

    def observe(self, message: Telemetry) -> None:
        """Take in the rows of one site."""
        wanted: Any = [message.columns.index(name) for name in SCORED]
        if wanted == list(range(wanted[0], wanted[0] + len(SCORED))):
            wanted = slice(wanted[0], wanted[0] + len(SCORED))
        for row in unpack(message)[:, :, wanted].transpose(0, 2, 1).astype(np.float64, order="C"):
            mean, good = self._means.get(message.site), np.isfinite(row)
            if mean is not None and message.site not in self._gaps and good.all():
                mean *= _DECAY
                mean += (1.0 - _DECAY) * row
            else:
                self._with_gaps(message.site, row, good.all(axis=0))

    def _with_gaps(self, site: str, row: np.ndarray, good: np.ndarray) -> None:
        mean = self._means.get(site, np.full(row.shape, np.nan))
        mean = np.where(np.isnan(mean), row, _DECAY * mean + (1.0 - _DECAY) * row)
        self._means[site] = np.where(good, mean, np.nan)
        (self._gaps.discard if good.all() else self._gaps.add)(site)

    def means(self, site: str, seeds: int) -> np.ndarray:
        """The running means of a site, ``[seeds, 3]`` in the order of SCORED; NaN for a seed without health."""
        return self._means[site].T if site in self._means else np.full((seeds, len(SCORED)), np.nan)

    def need(self, site: str, weights: tuple[float, float, float]) -> dict[int, float]:
        """Score by seed number, of the seeds whose health is known; higher: likelier to gain from a branch.

        ``w0 · 1/(1 + variance/mean variance of the site) + w1 · near-zero fraction + w2 · |correlation|``: a chunk that
        hardly varies, is mostly silent or repeats what the others say is capacity that the host does not use.
        """
        if site not in self._means:
            return {}
        score = self.scores(site, self._means[site].shape[1], weights)
        return {int(seed): float(score[seed]) for seed in np.flatnonzero(~np.isnan(score))}

    def scores(self, site: str, seeds: int, weights: tuple[float, float, float]) -> np.ndarray:
        """The same of every seed, ``[seeds]``; NaN where the health is not known."""
        variance, near_zero, correlation = means = self.means(site, seeds).T
        whole = site in self._means and site not in self._gaps
        known = True if whole else ~np.isnan(means).any(axis=0)
        some = variance if whole else variance[known]
        usual = float(np.add.reduce(some)) / len(some) if len(some) else 0.0
        quiet = 1.0 / (1.0 + variance / usual) if usual > 0.0 else np.ones_like(variance)
        score: np.ndarray = weights[0] * quiet + weights[1] * near_zero + weights[2] * np.abs(correlation)
        return score if whole else np.where(known, score, np.nan)

    def state(self) -> dict[str, Any]:
        """JSON-able; None stands for a seed without health."""
        return {site: [None if np.isnan(row).any() else row.tolist() for row in means.T] for site, means in self._means.items()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from ``state``."""
        unknown = [np.nan] * len(SCORED)
        self._means = {site: np.array([row or unknown for row in rows]).T.copy() for site, rows in state.items()}
        self._gaps = {site for site, means in self._means.items() if np.isnan(means).any()}
