"""From p-values to one of four verdicts: Holm's correction, and the rule that combines both tests."""

from __future__ import annotations

from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from esper.compare.statistics.sign_flip import FLIPS, equivalence, sign_flip

Array = NDArray[np.float64]


def holm(p_values: Array) -> Array:
    """Holm's adjusted p-values (1979) along the first axis, shape ``[comparisons, ...]``; reject where ≤ α."""
    p = np.asarray(p_values, dtype=np.float64)
    if not len(p):
        return p
    order = np.argsort(p, axis=0, kind="stable")
    factors = np.arange(len(p), 0, -1.0).reshape((-1,) + (1,) * (p.ndim - 1))
    stepped = np.maximum.accumulate(np.take_along_axis(p, order, axis=0) * factors, axis=0)
    adjusted = np.empty_like(p)
    np.put_along_axis(adjusted, order, np.minimum(stepped, 1.0), axis=0)
    return adjusted


def holm_levels(p_values: Array, adjusted: Array, alpha: float) -> Array:
    """The level at which Holm's procedure tests each comparison, ``[comparisons]``, from its p-values and the adjusted ones.

    The first is tested at α/k, and every rejection leaves the others its share. The others stay at the level at which the
    procedure stopped. An interval of confidence 1 − level excludes 0 exactly where the comparison is rejected.
    """
    order = np.lexsort((p_values, adjusted))
    places = np.minimum(np.argsort(order), int((adjusted <= alpha).sum()))
    levels: Array = alpha / np.maximum(len(order) - places, 1)
    return levels


class Verdict(IntEnum):
    """The outcome of a comparison of B with the reference A."""

    INCONCLUSIVE = 0
    B_BETTER = 1
    A_BETTER = 2
    EQUIVALENT = 3

    @property
    def label(self) -> str:
        """The verdict in the words of ``comparison.json``."""
        return ("inconclusive", "B better", "A better", "equivalent")[self]


def classify(mean: Array, p_difference: Array, p_equivalence: Array, alpha: float) -> NDArray[np.int8]:
    """Verdicts from Holm-adjusted p-values, elementwise.

    *Equivalent* where the difference is shown to lie within the minimum effect, also when it is surely not zero: it
    is then surely not worth having. *Better* where it is surely not zero and not shown to be that small.
    """
    codes = np.full(np.shape(mean), Verdict.INCONCLUSIVE, dtype=np.int8)
    sure = np.asarray(p_difference) <= alpha
    codes[sure & (mean > 0)] = Verdict.B_BETTER
    codes[sure & (mean < 0)] = Verdict.A_BETTER
    codes[np.asarray(p_equivalence) <= alpha] = Verdict.EQUIVALENT
    return codes


def verdicts(
    differences: Array,
    minimum_effect: float,
    alpha: float,
    *,
    flips: int = FLIPS,
    rng: np.random.Generator | None = None,
) -> NDArray[np.int8]:
    """Verdicts of whole sweeps at once: ``[pairs, comparisons, sweeps]`` → ``[comparisons, sweeps]``.

    The same steps as the analysis of one sweep, in a form that a calibration can repeat ten thousand times.
    """
    p_difference = holm(sign_flip(differences, flips=flips, rng=rng))
    p_equivalence = holm(equivalence(differences, minimum_effect, flips=flips, rng=rng))
    return classify(differences.mean(axis=0), p_difference, p_equivalence, alpha)
