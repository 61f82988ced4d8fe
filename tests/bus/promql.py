"""As much of Prometheus' query language as alerts and dashboard use, over two scrapes; anything else is an error.

https://prometheus.io/docs/prometheus/latest/querying/: a vector is a value by labels; ``rate`` and ``increase`` take a
counter that went down as one that began anew; ``histogram_quantile`` interpolates within its bucket.
"""

from __future__ import annotations

import math
import operator
import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

from prometheus_client.samples import Sample

Labels = frozenset[tuple[str, str]]
Vector = dict[Labels, float]
TOKEN = re.compile(r"\s*(?:(\d[\d.]*(?:e\d+)?)|([a-zA-Z_]\w*)|(\[\d+[smh]\])|(>=|<=|==|!=|[><(){},=])|(\"[^\"]*\"))")
COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    **{"==": operator.eq, "!=": operator.ne, ">": operator.gt},
    **{"<": operator.lt, ">=": operator.ge, "<=": operator.le},
}
AGGREGATES: dict[str, Callable[[list[float]], float]] = {"sum": sum, "max": max, "min": min}


@dataclass
class Scrapes:
    """Two scrapes of one endpoint, ``elapsed_s`` apart."""

    first: list[Sample]
    last: list[Sample]
    elapsed_s: float


def evaluate(query: str, scrapes: Scrapes) -> Vector:
    """What a query returns at the last scrape."""
    return _Query(query, scrapes).whole()


class _Query:
    def __init__(self, text: str, scrapes: Scrapes) -> None:
        self._text, self._scrapes = text, scrapes
        self._tokens = [match.group().strip() for match in TOKEN.finditer(text)]
        assert "".join(self._tokens) == re.sub(r"\s", "", text), f"not understood: {text}"

    def whole(self) -> Vector:
        vector = self._vector()
        if self._tokens:
            assert self._tokens[0] in COMPARISONS, f"not understood: {self._text}"
            compare, limit = COMPARISONS[self._take()], float(self._take())
            vector = {labels: value for labels, value in vector.items() if compare(value, limit)}
        assert not self._tokens, f"not understood: {self._text}"
        return vector

    def _take(self, wanted: str = "") -> str:
        token = self._tokens.pop(0)
        assert not wanted or token == wanted, f"{wanted} expected, not {token}: {self._text}"
        return token

    def _vector(self) -> Vector:
        name = self._take()
        if name in AGGREGATES:
            return self._aggregate(AGGREGATES[name])
        if name in ("rate", "increase"):
            return self._growth(per_s=name == "rate")
        if name == "histogram_quantile":
            self._take("(")
            quantile = float(self._take())
            self._take(",")
            return _quantile(quantile, self._closed())
        return _select(self._scrapes.last, name)

    def _closed(self) -> Vector:
        vector = self._vector()
        self._take(")")
        return vector

    def _aggregate(self, function: Callable[[list[float]], float]) -> Vector:
        self._take("by")
        self._take("(")
        kept = []
        while (token := self._take()) != ")":
            kept += [] if token == "," else [token]
        self._take("(")
        groups: dict[Labels, list[float]] = defaultdict(list)
        for labels, value in self._closed().items():
            assert set(kept) <= dict(labels).keys(), f"{kept} are not all labels of {dict(labels)}: {self._text}"
            groups[frozenset((name, one) for name, one in labels if name in kept)].append(value)
        return {labels: function(values) for labels, values in groups.items()}

    def _growth(self, per_s: bool) -> Vector:
        self._take("(")
        name = self._take()
        assert re.fullmatch(r"\[\d+[smh]\]", self._take()), self._text
        self._take(")")
        before, now = _select(self._scrapes.first, name), _select(self._scrapes.last, name)
        grown = {labels: now[labels] - (old if now[labels] >= old else 0.0) for labels, old in before.items() if labels in now}
        return {labels: value / (self._scrapes.elapsed_s if per_s else 1.0) for labels, value in grown.items()}


def _select(samples: list[Sample], name: str) -> Vector:
    return {frozenset(sample.labels.items()): sample.value for sample in samples if sample.name == name}


def _quantile(quantile: float, buckets: Vector) -> Vector:
    histograms: dict[Labels, list[tuple[float, float]]] = defaultdict(list)
    for labels, count in buckets.items():
        bound = float(dict(labels)["le"])
        histograms[frozenset(pair for pair in labels if pair[0] != "le")].append((bound, count))
    return {labels: _within(quantile, sorted(found)) for labels, found in histograms.items()}


def _within(quantile: float, buckets: list[tuple[float, float]]) -> float:
    rank = quantile * buckets[-1][1]
    if not rank:
        return math.nan
    low, below = 0.0, 0.0
    for bound, count in buckets:
        if count >= rank:
            return low if math.isinf(bound) else low + (bound - low) * (rank - below) / (count - below)
        low, below = bound, count
    raise AssertionError("the last bucket holds them all")
