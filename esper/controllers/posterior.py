"""Bayesian linear regression over named features: the posterior of a contextual bandit, and the evidence that it rests on.

With rewards ``r = x·w + ε``, ``ε ~ N(0, σ²)``, ``w | σ² ~ N(m₀, σ²/λ · I)`` and ``σ² ~ IG(a₀, b₀)`` the posterior is of the same form:

    Λ = λI + A,  m = Λ⁻¹(λ m₀ + h),  a = a₀ + n/2,  b = b₀ + ½(q + λ m₀·m₀ − m·Λm)

where ``A = Σ x xᵀ``, ``h = Σ r x``, ``q = Σ r²`` and ``n`` are all that counts of the past (Murphy 2007, "Conjugate Bayesian analysis of
the Gaussian distribution"). They add up, so the evidence of several runs is the sum of theirs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np


class Evidence:
    """Sums over rewarded decisions, by feature name: ``A`` float64 ``[d, d]``, ``h`` ``[d]``, ``q`` and the count ``n``."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.place: dict[str, int] = {}
        self.A = np.zeros((0, 0))
        self.h = np.zeros(0)
        self.q = 0.0
        self.n = 0

    def know(self, names: list[str]) -> None:
        """Make room for features that were not known."""
        new = [name for name in dict.fromkeys(names) if name not in self.place]
        if new:
            self.place |= {name: len(self.names) + number for number, name in enumerate(new)}
            self.names = [*self.names, *new]
            self.A = np.pad(self.A, (0, len(new)))
            self.h = np.pad(self.h, (0, len(new)))

    def add(self, features: Mapping[str, float], reward: float) -> None:
        """One rewarded decision."""
        self.know(list(features))
        rows = [self.place[name] for name in features]
        x = np.array([features[name] for name in features], float)
        self.A[np.ix_(rows, rows)] += np.outer(x, x)
        self.h[rows] += reward * x
        self.q += reward * reward
        self.n += 1

    def merge(self, other: Evidence) -> None:
        """Add the decisions of another."""
        self.know(other.names)
        rows = [self.place[name] for name in other.names]
        self.A[np.ix_(rows, rows)] += other.A
        self.h[rows] += other.h
        self.q += other.q
        self.n += other.n

    def state(self) -> dict[str, Any]:
        """JSON-able: of the symmetric matrix the lower half, row by row."""
        lower = self.A[np.tril_indices(len(self.names))].tolist()
        return {"names": self.names, "A": lower, "h": self.h.tolist(), "q": self.q, "n": self.n}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Evidence:
        """Inverse of ``state``. Raises KeyError, TypeError or ValueError for anything else."""
        made = cls()
        made.know([str(name) for name in state["names"]])
        size = len(made.names)
        lower = np.asarray(state["A"], float)
        made.A[np.tril_indices(size)] = lower
        made.A = made.A + np.tril(made.A, -1).T
        made.h = np.asarray(state["h"], float)
        made.q, made.n = float(state["q"]), int(state["n"])
        whole = np.isfinite(made.A).all() and np.isfinite(made.h).all() and np.isfinite(made.q)
        if made.h.shape != (size,) or not whole or made.n < 0:
            raise ValueError("these are no sums over decisions")
        return made


class Posterior:
    """The posterior that some evidence leads to; ``mean`` ``[d]`` and the Cholesky factor of Λ are computed once."""

    def __init__(self, evidence: Evidence, prior_mean: Mapping[str, float], prior_precision: float, shape: float, scale: float) -> None:
        size = len(evidence.names)
        start = np.array([prior_mean.get(name, 0.0) for name in evidence.names])
        precision = evidence.A + prior_precision * np.eye(size)
        self.place = evidence.place
        self._factor = np.linalg.cholesky(precision)
        self.mean = np.linalg.solve(precision, prior_precision * start + evidence.h)
        explained = evidence.q + prior_precision * float(start @ start) - float(self.mean @ precision @ self.mean)
        self.shape = shape + 0.5 * evidence.n
        self.scale = scale + 0.5 * max(0.0, explained)

    @property
    def noise(self) -> float:
        """Expected standard deviation of a reward around its mean."""
        return float(np.sqrt(self.scale / max(self.shape - 1.0, 0.5)))

    def draw(self, lot: np.random.Generator, count: int) -> np.ndarray:
        """``count`` draws of the weights, ``[count, d]``."""
        variance = self.scale / lot.gamma(self.shape, 1.0, count)
        z = np.linalg.solve(self._factor.T, lot.standard_normal((len(self.mean), count)))
        return np.asarray(self.mean + np.sqrt(variance)[:, None] * z.T)

    def spread(self, x: np.ndarray) -> float:
        """Standard deviation of the expected reward of features ``x`` ``[d]``."""
        return self.noise * float(np.linalg.norm(np.linalg.solve(self._factor, x)))
