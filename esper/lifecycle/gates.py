"""Gates: the measurement that a transition requires. A gate fails closed: a missing, NaN or infinite value never passes."""

from __future__ import annotations

import math

from esper.lifecycle.stages import Stage

GATES: dict[tuple[Stage, Stage], str] = {
    (Stage.TRAINING, Stage.GRAFTING): "readiness",
    (Stage.GRAFTING, Stage.STABILIZATION): "ramp",
    (Stage.STABILIZATION, Stage.EVALUATING): "stability",
    (Stage.EVALUATING, Stage.FINE_TUNING): "gain",
    (Stage.FINE_TUNING, Stage.FOSSILIZED): "final_gain",
}
"""The measurement behind each forward transition that must be earned."""


def passes(value: float | None, threshold: float) -> bool:
    """Whether a measured value reaches the threshold; None, NaN and infinities never do."""
    return value is not None and math.isfinite(value) and math.isfinite(threshold) and value >= threshold


def spent(significance: float, look: int) -> float:
    """Error probability allotted to look number ``look`` (from 1), so that all looks together stay within ``significance``.

    ``significance / (k (k + 1))`` sums to ``significance`` over k = 1, 2, …; by the union bound no number of looks
    exceeds it (Bonferroni alpha spending).
    """
    if look < 1:
        raise ValueError(f"looks are counted from 1, got {look}")
    return significance / (look * (look + 1))
