"""The judge: the worth of a branch on data kept for judging, by switching it off with everything else unchanged."""

from __future__ import annotations

import functools
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from esper.checkpoint.tree import kept
from esper.distributed import Ranks
from esper.engine.costs import Meter
from esper.engine.extra_passes import drawing_alike, shapes_of, to_device, untouched_buffers
from esper.seeds import Branch, SeedRegistry
from esper.seeds.sites import quiet_evaluation

LossFunction = Callable[[nn.Module, Any], Tensor]

RECENT = 4
"""Training batches on which norm statistics are recalibrated."""


@dataclass(frozen=True)
class Gain:
    """Loss off minus loss on: mean over ``samples`` pairs, and its lower confidence bound."""

    mean: float
    bound: float
    samples: int


def lower_bound(differences: Tensor, error: float) -> Gain:
    """One-sided lower confidence bound of the mean of paired differences ``[n]`` at error rate ``error``.

    Student's t with n − 1 degrees of freedom (Student 1908), exact for differences drawn from a normal distribution.
    With fewer than two pairs, or a difference that is not finite, the bound is NaN and so passes no gate.
    """
    n = differences.numel()
    values = differences.double()
    mean = float(values.mean()) if n else float("nan")
    if n < 2 or not math.isfinite(mean):
        return Gain(mean, float("nan"), n)
    t = quantile(error, n - 1)
    return Gain(mean, mean - t * float(values.std()) / math.sqrt(n), n)


class Judge:
    """Judges branches on the batches of ``data``; ``loss(model, batch)`` gives one value a sample, or one a batch.

    For the last look, ``on`` holds the losses ``[n]`` with everything on, ``off`` those without each branch, and ``spoiled`` the number of
    losses that were not finite with the branch off, which is not its fault.
    """

    def __init__(
        self, registry: SeedRegistry, loss: LossFunction, data: Iterable[Any], device: torch.device, meter: Meter, ranks: Ranks
    ) -> None:
        self.registry = registry
        self.loss = loss
        self.data = data
        self.device = device
        self.meter = meter
        self.ranks = ranks
        self.recent: deque[Any] = deque(maxlen=RECENT)
        self.gathered: Callable[[], list[Any]] | None = None
        """What gives the recent batches, where they are made again when they are needed and none is remembered."""
        self.spoiled = 0
        self.on = torch.zeros(0)
        self.off: list[Tensor] = []
        self._has_norms = any(_has_statistics(module) for module in registry.model.modules())

    def remember(self, batch: Any) -> None:
        """Keep a training batch for recalibrating norm statistics; a host without such statistics keeps none."""
        if self._has_norms and self.gathered is None:
            self.recent.append(batch)

    def look(self, branches: list[Branch], errors: list[float]) -> list[Gain]:
        """The gain of each branch, all others unchanged, with bounds at the given error rates."""
        self.registry.refresh()  # commands of this tick may have taken branches away that the last forward still had
        on = self.on = self._losses()
        self.off = []
        gains = []
        for branch, error in zip(branches, errors, strict=True):
            with self.registry.without(branch):
                off = self._losses()
            self.off.append(off)
            self.spoiled = int((~torch.isfinite(off)).sum())
            gains.append(lower_bound(off - on, error))
        return gains

    def exchange(self, successor: Branch, predecessor: Branch, error: float) -> Gain:
        """The gain of a branch in the place of another, whichever is present: losses with the other minus losses with it."""
        self.registry.refresh()
        there, away = (successor, predecessor) if predecessor.held else (predecessor, successor)
        now = self._losses()
        with self.registry.exchanged(there, away):
            then = self._losses()
        return lower_bound(then - now if predecessor.held else now - then, error)

    def losses(self, without: list[Branch]) -> Tensor:
        """Losses ``[n]`` float64 on the judge set with some branches off and all others unchanged."""
        self.registry.refresh()
        with self.registry.without(*without):
            return self._losses()

    def state(self) -> dict[str, Any]:
        """The remembered batches; none of them where one is of a kind of the user's own: the judge gathers others."""
        packed = [_packed(batch) for batch in self.recent]
        return {"recent": [] if None in packed else packed}

    def load(self, state: dict[str, Any], device: torch.device) -> None:
        """Remember the batches of a saved state; a state of esper's own trainer has none, since that can build them again."""
        for batch in kept(state.get("recent", [])):
            self.remember(_unpacked(batch, device))

    def _losses(self) -> Tensor:
        model = self.registry.model
        norms = [module for module in model.modules() if _has_statistics(module) and module.training]
        recordings = [layer.recording for layer in self.registry.layers]
        for layer in self.registry.layers:
            layer.recording = None
        values = []
        self.ranks.come_to("a look at the judge set")
        try:
            with quiet_evaluation(model), untouched_buffers(model), drawing_alike(self.data), self._recalibrated(norms):
                for batch, counts in self._share():
                    batch = to_device(batch, self.device)
                    with self.meter.counting("judge", (self.registry.cost_key(), shapes_of(batch))) if counts else nullcontext():
                        found = self.loss(model, batch).detach().reshape(-1).double().cpu()
                    if counts:
                        values.append(found)
        finally:
            for layer, recording in zip(self.registry.layers, recordings, strict=True):
                layer.recording = recording
        values = self._of_all(values)
        return torch.cat(values) if values else torch.zeros(0)

    def _share(self) -> Iterator[tuple[Any, bool]]:
        """This rank's share of the batches, each with whether its losses count.

        Of a sharded host the last rank's batches may be followed by one more: a pass takes all ranks, so all make the same number.
        """
        number, batch = -1, None
        for number, batch in enumerate(self.data):
            if number % self.ranks.size == self.ranks.rank:
                yield batch, True
        if self.ranks.sharded and 0 < (number + 1) % self.ranks.size <= self.ranks.rank:
            yield batch, False

    def _of_all(self, values: list[Tensor]) -> list[Tensor]:
        """The losses of all batches, in the order of the data; every rank has measured its share of them."""
        if self.ranks.size == 1:
            return values
        found = self.ranks.gather("the judge set", [value.numel() for value in values], torch.cat(values) if values else None)
        shares = [list(losses.split(sizes)) if sizes else [] for sizes, losses in found]
        return [shares[number % len(shares)][number // len(shares)] for number in range(sum(map(len, shares)))]

    @property
    def _recalibrates(self) -> bool:
        """Whether this rank makes the passes that measure norm statistics; those of rank 0 are taken."""
        return self.ranks.first or self.ranks.sharded

    @contextmanager
    def _recalibrated(self, norms: list[Any]) -> Iterator[None]:
        """Within: the statistics of these norms are measured on recent training batches, for the present branches.

        Norms that the user froze (evaluation mode) keep theirs.
        """
        recent = list(self.recent) if self.gathered is None else self.gathered() if norms and self._recalibrates else []
        if not norms or not self.ranks.decided("recent batches", lambda: len(recent)):
            yield
            return
        model = self.registry.model
        with untouched_buffers(model):
            momenta = [norm.momentum for norm in norms]
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None
                norm.training = True
            try:
                for batch in recent if self._recalibrates else ():
                    with self.meter.counting("judge", ("recalibrate", self.registry.cost_key(), shapes_of(batch))):
                        self.loss(model, batch)
            finally:
                for norm, momentum in zip(norms, momenta, strict=True):
                    norm.momentum = momentum
                    norm.training = False
            self.ranks.from_rank([buffer for norm in norms for buffer in (norm.running_mean, norm.running_var)])
            yield


def _has_statistics(module: nn.Module) -> bool:
    return getattr(module, "running_mean", None) is not None


def _packed(batch: Any) -> Any:
    """The batch with its kinds of containers told, None for one that could not be built again."""
    if batch is None or isinstance(batch, (Tensor, str, int, float)):
        return ["value", batch]
    kind = "list" if type(batch) is list else "tuple" if type(batch) is tuple else "dict" if isinstance(batch, Mapping) else ""
    parts = dict(batch) if kind == "dict" else dict(enumerate(batch)) if kind else {}
    packed = {str(key): _packed(part) for key, part in parts.items()}
    if not kind or None in packed.values() or (kind == "dict" and not all(isinstance(key, str) for key in parts)):
        return None
    return [kind, packed]


def _unpacked(packed: Any, device: Any) -> Any:
    kind, held = packed
    if kind == "value":
        return held.to(device) if isinstance(held, Tensor) else held
    parts = {key: _unpacked(part, device) for key, part in held.items()}
    return parts if kind == "dict" else tuple(parts.values()) if kind == "tuple" else list(parts.values())


@functools.lru_cache(maxsize=256)
def quantile(upper_tail: float, dof: int) -> float:
    """The value that a t variable with ``dof`` degrees of freedom exceeds with probability ``upper_tail`` in (0, 0.5].

    By bisection of the tail, ``P(T > t) = ½·I_{v/(v+t²)}(v/2, ½)``, to the last bits of a float.
    """
    assert 0.0 < upper_tail <= 0.5 and dof >= 1, (upper_tail, dof)
    low, high = 0.0, 1.0
    while _tail(high, dof) > upper_tail:
        low, high = high, 2.0 * high
    for _ in range(200):
        middle = 0.5 * (low + high)
        if middle in (low, high):
            break
        low, high = (middle, high) if _tail(middle, dof) > upper_tail else (low, middle)
    return high


def _tail(t: float, dof: int) -> float:
    a, b, square = 0.5 * dof, 0.5, t * t
    x, rest = dof / (dof + square), square / (dof + square)
    front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    front += a * math.log(x) + (b * math.log(rest) if rest > 0.0 else 0.0)
    if rest == 0.0:
        return 0.5
    if x < (a + 1.0) / (a + b + 2.0):
        return 0.5 * math.exp(front) * _fraction(a, b, x) / a
    return 0.5 * (1.0 - math.exp(front) * _fraction(b, a, rest) / b)


def _fraction(a: float, b: float, x: float) -> float:
    """Continued fraction of the incomplete beta function by Lentz's method (Abramowitz & Stegun 26.5.8)."""
    tiny = 1e-300
    c, d = 1.0, 1.0 / (_away(1.0 - (a + b) * x / (a + 1.0), tiny))
    value = d
    for m in range(1, 1000):
        for term in (
            m * (b - m) * x / ((a + 2 * m - 1.0) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1.0)),
        ):
            d = 1.0 / _away(1.0 + term * d, tiny)
            c = _away(1.0 + term / c, tiny)
            value *= c * d
        if abs(c * d - 1.0) < 1e-15:
            break
    return value


def _away(value: float, tiny: float) -> float:
    return tiny if abs(value) < tiny else value
