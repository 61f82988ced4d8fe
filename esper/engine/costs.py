"""The costs of a run: multiply-accumulates (MACs) of every pass, and seconds by activity.

MACs are counted from the shapes of matrix products and convolutions.
A pass of one kind, structure and batch shape always costs the same, so each is counted once, by torch's own counter of
floating-point operations, and added up from then on. Additions, norms and activations are not counted.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils.flop_counter import FlopCounterMode
from torch.utils.module_tracker import ModuleTracker

from esper.kernels import Kernels


class _NoModules(ModuleTracker):
    """Watches no module: torch's own hooks every tensor that a module is given, which ``autograd.grad`` forbids for a parameter."""

    def __enter__(self) -> _NoModules:
        return self

    def __exit__(self, *raised: object) -> None:
        return None


class _Total(FlopCounterMode):
    """Torch's counter, of all operations together."""

    def __init__(self) -> None:
        super().__init__(display=False)
        self.mod_tracker = _NoModules()


class Meter:
    """MACs by kind of pass: ``step`` (forward and backward), ``shadow``, ``objective``, ``judge``."""

    def __init__(self, kernels: Kernels | None = None) -> None:
        self.kernels = kernels
        self.spent: dict[str, int] = {}
        self._known: dict[Hashable, int] = {}
        self._first: dict[Hashable, tuple[Any, ...]] = {}

    @property
    def total(self) -> int:
        """All MACs so far."""
        return sum(self.spent.values())

    def knows(self, kind: str, key: Hashable) -> bool:
        """Whether a pass of this kind and key was counted already."""
        return (kind, key) in self._known

    @contextmanager
    def counting(self, kind: str, key: Hashable) -> Iterator[None]:
        """Add the MACs of the passes inside; they are counted the first time a key is seen."""
        if (kind, key) in self._known:
            yield
        else:
            with self._counter() as counter:
                yield
            self._known[(kind, key)] = counter.get_total_flops() // 2
        self.add(kind, key)

    @contextmanager
    def learning(self, kind: str, key: Hashable) -> Iterator[None]:
        """Count the MACs of the passes inside for later, without adding them."""
        with self._counter() as counter:
            yield
        self._known[(kind, key)] = counter.get_total_flops() // 2

    def knows_in_proportion(self, kind: str, structure: Hashable, shapes: tuple[Any, ...]) -> bool:
        """Whether a pass with the key ``(structure, shapes)`` was counted, or one of this structure with a batch of other shapes.

        Its cost is then taken in proportion to the numbers in the batch.
        """
        if self.knows(kind, (structure, shapes)):
            return True
        first = self._first.get((kind, structure))
        if first is None or not self.knows(kind, (structure, first)):
            self._first[(kind, structure)] = shapes
            return False
        share = numbers_in(shapes) / numbers_in(first)
        self._known[(kind, (structure, shapes))] = round(self._known[(kind, (structure, first))] * share)
        return True

    @contextmanager
    def _counter(self) -> Iterator[FlopCounterMode]:
        """Torch's counter; fused kernels, whose work it cannot see, step aside for the products they stand for."""
        before = None if self.kernels is None else self.kernels.suspended
        try:
            if self.kernels is not None:
                self.kernels.suspended = True
            with _Total() as counter:
                yield counter
        finally:
            if self.kernels is not None:
                self.kernels.suspended = bool(before)

    def add(self, kind: str, key: Hashable) -> None:
        """Add a pass that was counted before."""
        self.spent[kind] = self.spent.get(kind, 0) + self._known[(kind, key)]

    def cost(self, kind: str, key: Hashable) -> int:
        """MACs of one pass that was counted before."""
        return self._known[(kind, key)]

    def state(self) -> dict[str, int]:
        """MACs by kind of pass, for a checkpoint."""
        return dict(self.spent)

    def load(self, state: dict[str, int]) -> None:
        """Take over a saved state."""
        self.spent = {name: int(macs) for name, macs in state.items()}


def numbers_in(shapes: tuple[Any, ...]) -> int:
    """How many numbers the first tensor of a batch has, whose ``shapes_of`` these are."""
    while shapes and not isinstance(shapes[0], int):
        shapes = shapes[0] if not isinstance(shapes[0], str) else shapes[1]
    return int(max(1, math.prod(shapes)))


def compiled_so_far() -> tuple[int, float]:
    """Graphs that torch's compiler has made in this process, and the seconds it has spent on them."""
    utils = sys.modules.get("torch._dynamo.utils")
    if utils is None:  # nothing was compiled
        return 0, 0.0
    names, seconds = utils.compile_times(repr="csv", aggregate=True)
    spent = dict(zip(names, seconds, strict=True)).get("_compile.compile_inner", 0.0)
    return int(utils.counters["stats"]["unique_graphs"]), float(spent)


class Compiling:
    """What torch's compiler has cost since this was made."""

    def __init__(self) -> None:
        self._before = compiled_so_far()

    @property
    def graphs(self) -> int:
        """Graphs made since then."""
        return compiled_so_far()[0] - self._before[0]

    @property
    def seconds(self) -> float:
        """Seconds spent on them."""
        return compiled_so_far()[1] - self._before[1]


class Stopwatch:
    """Seconds by name since it was made; ``total`` is all of them."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self.seconds: dict[str, float] = {}

    @property
    def total(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self._began

    def state(self) -> dict[str, float]:
        """Seconds by name, with ``total``, for a checkpoint."""
        return {**self.seconds, "total": self.total}

    def load(self, seconds: dict[str, float]) -> None:
        """Count on from a saved state."""
        self.seconds = {name: float(value) for name, value in seconds.items() if name != "total"}
        self._began = time.perf_counter() - float(seconds["total"])

    @contextmanager
    def timing(self, name: str) -> Iterator[None]:
        """Add the time spent inside to ``name``."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began
