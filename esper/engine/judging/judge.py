"""The judge: what a branch is worth on data kept for judging, by switching it off with everything else unchanged."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from esper.engine.extra_passes import drawing_alike, shapes_of, to_device, untouched_buffers
from esper.engine.judging.student_t import quantile
from esper.engine.macs import Meter
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

    Of the last look, ``on`` are the losses ``[n]`` with everything on and ``off`` those without each branch; ``spoiled`` says how many
    were not finite with the branch off, so by no fault of its own.
    """

    def __init__(self, registry: SeedRegistry, loss: LossFunction, data: Iterable[Any], device: torch.device, meter: Meter) -> None:
        self.registry = registry
        self.loss = loss
        self.data = data
        self.device = device
        self.meter = meter
        self.recent: deque[Any] = deque(maxlen=RECENT)
        self.spoiled = 0
        self.on = torch.zeros(0)
        self.off: list[Tensor] = []
        self._has_norms = any(_has_statistics(module) for module in registry.model.modules())

    def remember(self, batch: Any) -> None:
        """Keep a training batch for recalibrating norm statistics; a host without such statistics keeps none."""
        if self._has_norms:
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

    def losses(self, without: list[Branch]) -> Tensor:
        """Losses ``[n]`` float64 on the judge set with some branches off, all others as they are now."""
        self.registry.refresh()
        with self.registry.without(*without):
            return self._losses()

    def _losses(self) -> Tensor:
        model = self.registry.model
        norms = [module for module in model.modules() if _has_statistics(module) and module.training]
        recordings = [layer.recording for layer in self.registry.layers]
        for layer in self.registry.layers:
            layer.recording = None
        values = []
        try:
            with quiet_evaluation(model), untouched_buffers(model), drawing_alike(self.data), self._recalibrated(norms):
                for batch in self.data:
                    batch = to_device(batch, self.device)
                    with self.meter.counting("judge", (self.registry.structure(), shapes_of(batch))):
                        values.append(self.loss(model, batch).detach().reshape(-1).double().cpu())
        finally:
            for layer, recording in zip(self.registry.layers, recordings, strict=True):
                layer.recording = recording
        return torch.cat(values) if values else torch.zeros(0)

    @contextmanager
    def _recalibrated(self, norms: list[Any]) -> Iterator[None]:
        """Within: statistics of these norms measured anew on recent training batches, for the branches as they are now.

        Norms that the user froze (evaluation mode) keep theirs.
        """
        if not norms or not self.recent:
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
                for batch in self.recent:
                    with self.meter.counting("judge", ("recalibrate", self.registry.structure(), shapes_of(batch))):
                        self.loss(model, batch)
            finally:
                for norm, momentum in zip(norms, momenta, strict=True):
                    norm.momentum = momentum
                    norm.training = False
            yield


def _has_statistics(module: nn.Module) -> bool:
    return getattr(module, "running_mean", None) is not None
