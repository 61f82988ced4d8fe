"""From paired differences to one of four verdicts."""

from __future__ import annotations

from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from esper.compare.results.runs import Pairs
from esper.compare.statistics.corrections import holm
from esper.compare.statistics.sign_flip import FLIPS, equivalence, sign_flip

Array = NDArray[np.float64]


class Verdict(IntEnum):
    """What a comparison of B with the reference A ends in."""

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


def equivalence_of(pairs: Pairs, margin: float, flips: int = FLIPS) -> float:
    """P-value of "the arms differ by ``margin`` or more", by TOST over the pairs in which both runs finished.

    1 as soon as one arm alone failed in a pair. A failed run has no metric that could be shown to be near the other's:
    it is worse than any value, as in worst-rank analysis (Lachin 1999, Controlled Clinical Trials 20:408) and the
    composite strategy of ICH E9(R1), so its pair lies outside every margin. With such losses growing without bound the
    larger of the two one-sided p-values stays at 1/4 or above, however many other pairs there are. Pairs in which both
    runs failed show nothing and are left out here.
    """
    if pairs.lost.any():
        return 1.0
    return float(equivalence(pairs.tested[pairs.finished], margin, error=pairs.error[pairs.finished], flips=flips))


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
