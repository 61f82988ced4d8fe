"""Shadow forwards through the graph of a compiled host: see ``esper.seeds.shadow_sites``."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from esper.engine.costs import Meter
from esper.engine.extra_passes import DropoutReplay, shapes_of
from esper.engine.judging.judge import LossFunction
from esper.engine.supported_models import refuse_reentrant
from esper.seeds import Branch, SeedRegistry
from esper.seeds.branch_exceptions import containable
from esper.seeds.compiled_modules import called_by, compiled_again, compiled_whole
from esper.seeds.shadow_sites import ShadowSites, in_shadow

Failures = list[tuple[dict[int, int], Tensor]]
"""Branches by their places in a tensor that counts the failures of each."""

Collect = Callable[[Tensor, list[tuple[nn.Parameter, Tensor]]], None]
"""Takes the gradients of a loss for parameters, each with the tensor that stands for it."""

log = logging.getLogger(__name__)


class ShadowInGraph:
    """Runs a shadow forward compiled, as long as the graph serves; ``counts`` says whether costs are counted."""

    def __init__(self, registry: SeedRegistry, loss: LossFunction, replay: DropoutReplay, meter: Meter) -> None:
        self.registry, self.loss, self.replay, self.meter = registry, loss, replay, meter
        self.counts = True
        self._compiled: Any = None
        self._serves = True

    @property
    def serves(self) -> bool:
        """False once a shadow forward could not go through the graph: from then on none is tried."""
        return self._serves

    def run(self, training: list[Branch], batch: Any, collect: Collect) -> tuple[Tensor, Failures] | None:
        """The loss with these TRAINING branches, and how often each failed; None where no graph holds them all."""
        model = self.registry.model
        sites = self.registry.compiled.shadow(training) if self._serves else None
        if sites is None:
            return None
        if self._compiled is None:
            self._compiled = compiled_whole(model, self.registry.compiled.backend)
            self._serves = self._compiled is not None
        if not self._serves:
            return None
        with self.replay.again(), self.replay.resting(), in_shadow(self.registry, sites), compiled_again(), torch.enable_grad():
            try:
                with called_by(model, self._compiled):
                    loss = self.loss(model, batch).mean()
            except Exception as error:
                if not containable(error):
                    raise
                self._leave(f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}")
                return None
            if any(layer.ran_eagerly for layer in self.registry.layers):
                self._leave("the graph does not hold the whole host")
                return None
            collect(loss, sites.parameters)
        loss = loss.detach()
        if self.counts:
            self._count(sites, training, batch)
        return loss, [(sites.branches(), sites.failures())]

    def _leave(self, why: str) -> None:
        self._serves = False
        log.warning("seeds learn in forwards that are not compiled: %s", why)

    def _count(self, sites: ShadowSites, training: list[Branch], batch: Any) -> None:
        """Add the cost of a shadow pass. It is counted in a pass beside it, once for every mixture of branches."""
        key = (sites.key, shapes_of(batch))
        if not self.meter.knows_in_proportion("shadow", *key):
            with self.replay.again(), self.registry.shadow(training) as groups, self.meter.learning("shadow", key), torch.enable_grad():
                loss = self.loss(self.registry.model, batch).mean()
                refuse_reentrant(loss)
                parameters = [p for group in groups for p in group.bank_parameters() if p.requires_grad]
                if parameters and loss.requires_grad:
                    torch.autograd.grad(loss, parameters, allow_unused=True)
        self.meter.add("shadow", key)
