"""Random numbers of the analysis: one named generator per purpose, and simulated differences for statements of power."""

from __future__ import annotations

import zlib

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Noise = tuple[float, ...]


def generator(purpose: str, seed: int = 0) -> np.random.Generator:
    """A generator that depends on the purpose's name and the seed alone, never on earlier draws."""
    return np.random.default_rng(np.random.SeedSequence([seed, zlib.crc32(purpose.encode())]))


def simulated_differences(pairs: int, effect: float, noise: Noise, count: int) -> Array:
    """Differences of mean ``effect`` and unit spread, ``[pairs, count]``: normal, or the pilot's with random signs.

    A pilot's accuracies on n samples differ by multiples of 1/n, and so do those of the sweep that it stands for: equal
    differences and zeros make the test weaker, so they are kept and the effect is rounded up or down by lot.
    """
    rng, shape = generator("power", pairs), (pairs, count)
    if not noise:
        normal: Array = rng.standard_normal(shape) + effect
        return normal
    values = centred(np.asarray(noise))
    spread, step = float(values.std()), common_step(values)
    if not step:
        smooth: Array = (rng.choice(values, shape) * rng.choice((-1.0, 1.0), shape) + effect * spread) / spread
        return smooth
    shift = np.floor(effect * spread / step + rng.random(shape))
    whole: Array = np.round(rng.choice(values, shape) / step) * rng.choice((-1.0, 1.0), shape) + shift  # so that ties stay ties
    return whole * (step / spread)


def centred(values: Array) -> Array:
    """The values around their mean; around the step next to it where they are multiples of one."""
    step = common_step(values)
    mean = float(values.mean())
    return values - (step * round(mean / step) if step else mean)


def common_step(values: Array) -> float:
    """The step of which all values are multiples, 0.0 where there is none."""
    sizes = np.unique(np.abs(values)) if len(values) else np.zeros(1)
    gaps = np.diff(sizes, prepend=0.0)
    real = gaps[gaps > 1e-6 * sizes[-1]]
    if not len(real):
        return 0.0
    parts = values / real.min()
    return float(real.min()) if np.abs(parts - np.round(parts)).max() < 1e-3 else 0.0
