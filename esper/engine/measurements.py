"""The measurements of a tick: failures of branches, and the signals that strategies ask for.

``Measurements`` gathers them during the steps before the tick. ``take`` returns them as one frozen ``Measured``, which the tick reads.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from esper.distributed import Ranks, is_sharded
from esper.engine.agreement import Agreement, AtTick
from esper.engine.costs import Meter, Stopwatch
from esper.engine.device_readings import Readings
from esper.engine.extra_passes import DropoutReplay, shapes_of, untouched_buffers
from esper.engine.judging.judge import LossFunction
from esper.engine.learning.branch_optimizer import PATIENCE, BranchOptimizer
from esper.engine.learning.objectives import Objective
from esper.engine.port import Port
from esper.engine.supported_models import refuse_reentrant
from esper.lifecycle import Stage
from esper.messages import Alert, Command
from esper.seeds import Branch, SeedRegistry
from esper.seeds.branch_exceptions import take_errors

REPEATED = 3
"""Ticks at which a branch's code, or the strategy that blends it, may raise before the branch goes."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Measured:
    """The measurements of one tick; every mapping is by branch id.

    ``metric`` is the primary held-out metric if one came since the last tick, turned so that larger is better. ``error_rates`` are
    the shares of forwards that were not finite, where there were any, ``trouble`` the reasons, in words, for which a branch must go.
    """

    metric: float | None = None
    gradient_norms: Mapping[int, float] = field(default_factory=dict)
    counterfactual: Mapping[int, float] = field(default_factory=dict)
    error_rates: Mapping[int, float] = field(default_factory=dict)
    trouble: Mapping[int, str] = field(default_factory=dict)


class Faults:
    """Contains exceptions of the user's own parts: each is reported once, with its traceback in the log; a branch that repeats them goes.

    ``said`` holds the alerts that have been given, saved with the run. With ``debug`` the exception is raised again instead, with its own
    traceback.
    """

    def __init__(self, registry: SeedRegistry, port: Port, said: set[str], debug: bool) -> None:
        self.registry = registry
        self.port = port
        self.said = said
        self.debug = debug

    def note(self, raised: dict[int, Exception], tick: int, part: str = "") -> dict[int, str]:
        """Count the exceptions of ``part`` (the blueprint if empty) since the last tick, by branch.

        Returns the branches that have repeated them and must go, with the reason in words.
        """
        gone: dict[int, str] = {}
        for number, error in sorted(raised.items()):
            branch = self.registry.branches[number]
            branch.raised += 1
            culprit = part or f"blueprint {branch.blueprint}"
            self.say(culprit, branch, error, tick)
            if branch.raised >= REPEATED and branch.stage is not Stage.FOSSILIZED:
                gone[number] = f"exceptions at {branch.raised} ticks; {culprit} raised {one_line(error)}"
        return gone

    def say(self, part: str, branch: Branch, error: Exception, tick: int) -> None:
        """The alert and the log's traceback, once for each part and kind of exception; in debugging, the exception itself."""
        if self.debug:
            raise error
        key = f"raised {part} {type(error).__name__}"
        if key in self.said:
            return
        self.said.add(key)
        site = self.registry.sites[branch.site].name
        stays = branch.stage is Stage.FOSSILIZED
        then = "stays, and adds nothing when it does" if stays else f"adds nothing when it does, and goes after {REPEATED} ticks of it"
        text = f"{part} raised {one_line(error)} in branch {branch.id} of seed {branch.seed} at {site}; the branch {then}"
        log.error("%s", text, exc_info=error)
        self.port.emit(Alert(tick=tick, level="error", code="part_raised", text=text, site=site, seed=branch.seed))

    def say_kernel_alerts(self, tick: int) -> None:
        """Alerts of kernels that raised, or gave other values than torch."""
        kernels = self.registry.kernels
        while kernels is not None and kernels.alerts:
            code, text = kernels.alerts.pop(0)
            self.port.emit(Alert(tick=tick, level="error", code=code, text=text))


def one_line(error: Exception) -> str:
    """The exception's class and its message, on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(": ")


@dataclass
class ExtraPasses:
    """Passes beside the loop's own that leave no trace: same dropout masks, buffers put back, nothing recorded."""

    registry: SeedRegistry
    loss: LossFunction
    replay: DropoutReplay
    meter: Meter
    clock: Stopwatch
    silent: Callable[[], AbstractContextManager[None]]

    def counterfactual(self, branch: Branch, batch: Any) -> float:
        """Loss of a batch with the branch off minus the loss with it on."""
        with self.clock.timing("judge"), torch.no_grad(), untouched_buffers(self.registry.model), self.silent():
            on = self._loss(batch)
            with self.registry.without(branch):
                off = self._loss(batch)
        return off - on

    def count(self, batch: Any, ranks: Ranks) -> None:
        """Add the cost of the step's pass over a batch, which is counted once for every structure and shape.

        Of a host that ``ranks`` share out it is counted once for every structure alone: with another shape this process might be alone.
        """
        key = (self.registry.cost_key(), shapes_of(batch))
        if not (self.meter.knows_in_proportion("step", *key) if ranks.sharded else self.meter.knows("step", key)):
            ranks.come_to("a pass that counts operations")
            self.count_step(key, batch)
        self.meter.add("step", key)

    def count_step(self, key: Hashable, batch: Any) -> None:
        """Run the step's forward and backward once more under torch's counter, for the cost of every step with this key."""
        model = self.registry.model
        parameters: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
        with self.replay.again(), untouched_buffers(model), self.silent(), self.meter.learning("step", key), torch.enable_grad():
            loss = self.loss(model, batch).mean()
            leaves = refuse_reentrant(loss)
            if is_sharded(model):  # whose forward uses weights that it has gathered
                parameters = leaves
            if parameters and loss.requires_grad:
                torch.autograd.grad(loss, parameters, allow_unused=True)

    def _loss(self, batch: Any) -> float:
        key = ("counterfactual", self.registry.cost_key(), shapes_of(batch))
        with self.replay.again(), self.meter.counting("objective", key):
            return float(self.loss(self.registry.model, batch).mean())


class Measurements:
    """Gathers the measurements of the next tick; ``take`` returns them and starts again.

    ``asks_counterfactual(branch)`` says whether the strategy that blends a branch asks for it, which costs two forwards a branch every
    ``every`` ticks.
    """

    def __init__(
        self,
        registry: SeedRegistry,
        objective: Objective,
        branch_optimizer: BranchOptimizer,
        readings: Readings,
        faults: Faults,
        passes: ExtraPasses,
        asks_counterfactual: Callable[[Branch], bool],
        every: int,
    ) -> None:
        self.registry = registry
        self.objective = objective
        self.branch_optimizer = branch_optimizer
        self.readings = readings
        self.faults = faults
        self.passes = passes
        self.asks_counterfactual = asks_counterfactual
        self.every = every
        self.agreement: Agreement | None = None
        self.metric: float | None = None
        self.batch: Any = None
        self.scale = 1.0
        self.error_rates: dict[int, float] = {}
        self.unsound: set[int] = set()
        self.gradient_norms: Mapping[int, float] = {}

    def observe(self, metric: float) -> None:
        """A held-out metric, turned so that larger is better; the next tick alone sees it."""
        self.metric = metric

    def note_batch(self, batch: Any, scale: float) -> None:
        """The last micro-batch of the step, and the loss scale of its backward pass."""
        self.batch, self.scale = batch, scale

    def note_gradients(self, norms: Mapping[int, float]) -> None:
        """The norms of the branches' gradients in the last step."""
        self.gradient_norms = norms

    def forget_step(self) -> None:
        """Let no failure of the present step's forwards count."""
        for group in (group for layer in self.registry.layers for group in layer.groups):
            take_errors([group])
            group.failures.zero_()
            group.forwards = 0

    def take(self, tick: int, commands: list[Command]) -> tuple[Measured, list[Command]]:
        """Everything measured since the last tick, and the commands to obey: of several processes, those that rank 0 was given.

        Says which parts of the user's raised, and which fossils and kernels failed.
        """
        known = self._known_here(commands)
        if self.agreement is not None:
            known = self.agreement.tick(tick, known)
        rates, trouble = self._failures(tick, known)
        self.faults.say_kernel_alerts(tick)
        return Measured(known.metric, self.gradient_norms, self._counterfactuals(tick), rates, trouble), known.commands

    # --- failures ---

    def _known_here(self, commands: list[Command]) -> AtTick:
        """What this process has seen since the last tick."""
        raised, self.objective.raised = self.objective.raised, {}
        for layer in self.registry.layers:
            raised |= take_errors(layer.groups)
        self._post_failures()
        rates, self.error_rates = self.error_rates, {}
        failed = set(self.objective.failed)
        self.objective.failed.clear()
        metric, self.metric = self.metric, None  # a measurement counts once
        return AtTick(rates, failed, raised, metric, commands)

    def _failures(self, tick: int, known: AtTick) -> tuple[dict[int, float], dict[int, str]]:
        """Shares of forwards that failed, and the branches that must go for other reasons; says which fossils are not finite."""
        learner = self.branch_optimizer
        rates = {**known.rates, **dict.fromkeys((*known.failed, *learner.failures), 1.0)}
        overflow = "" if self.scale == 1.0 else f", {PATIENCE} steps in a row under a loss scale of {self.scale:g}"
        trouble = {branch: f"its gradient was not finite{overflow if branch in learner.scaled else ''}" for branch in learner.failures}
        learner.failures.clear()
        trouble |= self.faults.note(dict(known.raised), tick)
        for number, error_rate in rates.items():
            self._note_fossil(self.registry.branches[number], error_rate, tick)
        return rates, trouble

    def _note_fossil(self, branch: Branch, error_rate: float, tick: int) -> None:
        if branch.stage is Stage.FOSSILIZED and error_rate > 0 and not branch.unsound:
            site = self.registry.sites[branch.site].name
            text = f"the fossilized branch {branch.id} at {site} gives non-finite values; they are left out until it recovers"
            self.faults.port.emit(Alert(tick=tick, level="error", code="fossil_not_finite", text=text, site=site, seed=branch.seed))
        branch.unsound = error_rate > 0
        (self.unsound.add if branch.unsound else self.unsound.discard)(branch.id)

    def _post_failures(self) -> None:
        """Ask the device in which share of its forwards each branch was contained; read now, or at the next tick on a GPU."""
        compiled = self.registry.compiled
        if compiled.sites and not self.passes.replay.asleep:
            members = [compiled.members(number) for number in range(len(compiled.sites))]
            self.readings.post(compiled.containment_counts(), partial(self._note_contained, members))
        groups = [group for layer in self.registry.layers for group in layer.groups if group.forwards]
        if groups:
            shares = [group.failures / group.forwards for group in groups]
            self.readings.post(shares, partial(self._note_shares, [group.branches for group in groups]))
        for group in groups:
            group.failures.zero_()
            group.forwards = 0

    def _note_contained(self, members: list[dict[int, int]], values: list[Tensor]) -> None:
        for mine, contained, forwards in zip(members, values[: len(members)], values[len(members) :], strict=True):
            if mine and float(forwards) > 0.0:
                found = (contained / forwards).tolist() if bool(contained.any()) else None
                if found is not None:
                    self.error_rates.update((branch, found[seed]) for seed, branch in mine.items() if found[seed] != 0.0)
                self._note_sound(mine.values())

    def _note_shares(self, names: list[list[int]], shares: list[Tensor]) -> None:
        for branches, found in zip(names, shares, strict=True):
            if bool(found.any()):
                self.error_rates.update((branch, rate) for branch, rate in zip(branches, found.tolist(), strict=True) if rate != 0.0)
            self._note_sound(branches)

    def _note_sound(self, branches: Iterable[int]) -> None:
        """Note the error rate 0 of fossils that were unsound; for other branches it is no news."""
        if self.unsound:
            self.error_rates.update((branch, 0.0) for branch in branches if branch in self.unsound and branch not in self.error_rates)

    # --- signals of strategies ---

    def _counterfactuals(self, tick: int) -> dict[int, float]:
        if self.batch is None or tick % self.every:
            return {}
        asked = [branch for branch in self.registry.in_stage(Stage.GRAFTING) if self.asks_counterfactual(branch)]
        if self.agreement is None or not asked:
            return {branch.id: self.passes.counterfactual(branch, self.batch) for branch in asked}
        ranks, batch = self.agreement.ranks, self.batch
        ranks.come_to(f"passes at tick {tick}")
        values = ranks.decided(
            f"counterfactuals at tick {tick}", lambda: [self.passes.counterfactual(branch, batch) for branch in asked], ranks.size - 1, True
        )
        return {branch.id: value for branch, value in zip(asked, values, strict=True)}

    # --- checkpoints ---

    def state(self) -> dict[str, Any]:
        """The measurements gathered so far, for a checkpoint; taken between two steps, when the last batch is no longer needed."""
        return {
            "metric": self.metric,
            "rates": {str(branch): rate for branch, rate in self.error_rates.items()},
            "plans": [[[group.forwards, group.failures] for group in layer.groups] for layer in self.registry.layers],
        }

    def load(self, state: dict[str, Any]) -> None:
        """Take over a saved state; the registry has taken over its own."""
        self.metric = state["metric"]
        self.error_rates = {int(branch): float(rate) for branch, rate in state["rates"].items()}
        self.unsound = {branch.id for branch in self.registry.branches.entries if branch.unsound}
        for layer, counters in zip(self.registry.layers, state["plans"], strict=True):
            for group, (forwards, failures) in zip(layer.groups, counters, strict=True):
                group.forwards = int(forwards)
                group.failures.copy_(failures)
