"""``Grow``: the small API by which a training loop grows its model; esper's own loop uses it too.

In any loop: ``after_backward(batch)`` after the backward pass of a (micro-)batch, ``tick(loss)`` after the optimizer's
step, ``observe(…)`` when a held-out metric was measured, ``export()`` at the end.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from esper.checkpoint import store
from esper.checkpoint.tree import join, split
from esper.engine.attached_state import attached_state, read_state, take_over
from esper.engine.commands import Executor
from esper.engine.costs import Meter, Stopwatch
from esper.engine.device_readings import Readings
from esper.engine.exceptions import Faults
from esper.engine.extra_passes import DropoutReplay, host_parameters, shapes_of, untouched_buffers
from esper.engine.judging.gatekeeper import Gatekeeper
from esper.engine.judging.guard import Guard
from esper.engine.judging.judge import Judge, LossFunction
from esper.engine.learning.branch_optimizer import PATIENCE, BranchLearning, BranchOptimizer
from esper.engine.learning.learning_rate import HostRate
from esper.engine.learning.objectives import Objective
from esper.engine.port import NullPort, Port
from esper.engine.signals import LossSignal
from esper.engine.state import load_grow, topology
from esper.engine.supported_models import refuse_reentrant
from esper.engine.telemetry import Observer
from esper.engine.tick import Advance
from esper.engine.transitions import Transitions
from esper.engine.weight_averages import Follower
from esper.grafting import GraftingConfig, signals_of
from esper.kernels import MISMATCH
from esper.lifecycle import Ages, LifecycleConfig, Machine, Stage
from esper.lifecycle.transitions import BLENDED, LEARNS_FROM_TASK
from esper.messages import Alert, Command, Metrics, Report, RequestReport
from esper.seeds import Branch, SeedRegistry, TelemetryConfig
from esper.seeds.exceptions import take_errors
from esper.seeds.layer import ATTRIBUTE


@dataclass
class GrowSettings:
    """Everything ``attach`` was told beside the model: see there."""

    lifecycle: LifecycleConfig
    ages: Ages
    grafting: GraftingConfig
    telemetry: TelemetryConfig
    learning: BranchLearning
    total_ticks: int
    steps_per_tick: int = 1
    accumulate: int = 1
    count_macs: bool = True
    debug: bool = False


class Grow:
    """Grows one model. Build it with ``esper.engine.attach``."""

    def __init__(
        self,
        registry: SeedRegistry,
        settings: GrowSettings,
        loss: LossFunction,
        judge: Iterable[Any] | None,
        judge_loss: LossFunction | None,
        rate: HostRate,
        scaler: Any | None,
        port: Port | None,
        state: dict[str, Any] | None = None,
    ) -> None:
        self.registry = registry
        self.settings = settings
        self.loss = loss
        self.optimizer = rate.optimizer
        self.rate = rate
        self.scaler = scaler
        self.port: Port = NullPort() if port is None else port
        self.meter = Meter(registry.kernels)
        self.clock = Stopwatch()
        self.replay = DropoutReplay(registry.model)
        self.signal = LossSignal()
        config, ages = settings.lifecycle, settings.ages
        self.machine = Machine(registry.table, ages, config.reseed, config.training_slots)
        self.objective = Objective(config.objective, registry, loss, self.replay, self.meter)
        self.transitions = Transitions(registry, self.machine, settings.grafting, self.objective, self.port, self.optimizer)
        self.device = next(iter(host_parameters(registry.model).values())).device
        self.judge = None if judge is None else Judge(registry, judge_loss or loss, judge, self.device, self.meter)
        self.guard = Guard(self.transitions, self.judge if config.guard else None, self.signal, config.significance, ages.judge_every)
        self.gates = Gatekeeper(config, registry, self.judge, self.objective, self.signal, self.guard, self.port)
        self.gates.ramp_end = {name: _as_float32(config.alpha_max) for name, config in self.transitions.strategies.items()}
        self.faults = Faults(registry, self.port, self.gates.said, settings.debug)
        self.advance = Advance(config, ages, registry, self.transitions, self.gates, self.guard, self.signal, self.faults)
        self.readings = Readings(self.device)
        self.branch_optimizer = BranchOptimizer(registry, settings.learning, self.readings)
        self.observer = Observer(registry, settings.telemetry, self.objective, self.readings, self.port, lambda: self.tick_number)
        self.executor = Executor(self.transitions, self.gates, self.advance, self.observer.row)
        self._scale = 1.0
        self._last_batch: Any = None
        self.followers: list[Follower] = []
        self.known_averages: list[dict[str, Any]] = []  # of a state that is gone on from, in the order in which they were followed
        self._kept: Follower | None = None
        self._losses: list[Tensor | float] = []
        self.rates: dict[int, float] = {}
        self.steps = 0
        self.tick_number = 0
        self._begin(state)

    def _begin(self, state: dict[str, Any] | None) -> None:
        """Say that the run starts, or goes on from ``state``."""
        if state is not None:
            load_grow(self, state["grow"])
            take_over(self, state)
        self.port.started(self.tick_number, self.settings.total_ticks, self.observer.site_cards())
        self.registry.refresh()
        self._prepare()

    # --- the loop's calls ---

    def after_backward(self, batch: Any, loss: Tensor | float | None = None) -> None:
        """Call after ``loss.backward()`` of each micro-batch, with that batch as the model saw it (on its device).

        TRAINING seeds learn here. ``loss`` (unscaled, not divided for accumulation) spares a measuring forward, and serves
        where ``tick`` is given none.
        """
        self._last_batch = batch
        if loss is not None:
            loss = loss.detach() if isinstance(loss, Tensor) else loss
            self._losses.append(loss)
        self._scale = 1.0 if self.scaler is None else float(self.scaler.get_scale())
        self.set_aside()
        if self.settings.count_macs:
            self._count(batch)
        if self.judge is not None:
            self.judge.remember(batch)
        if self.registry.in_stage(Stage.TRAINING):
            with self.clock.timing("shadow"):
                value = None if loss is None else float(loss)
                self.objective.learn(batch, 1.0 / self.settings.accumulate, value, self.tick_number)

    def set_aside(self) -> None:
        """Under a gradient scaler: keep the branches' gradients, which only a tick unscales, from whoever clips the model's before it.

        ``after_backward`` does it; call it yourself, right after the backward pass, only where you clip before you call that.
        """
        if self.scaler is not None:
            self.objective.set_aside(parameter for layer in self.registry.layers for parameter in layer.parameters())

    def tick(self, metric: Tensor | float | None = None) -> bool:
        """Call after ``optimizer.step()``; ``metric`` is the step's training loss, else the mean of what ``after_backward`` was given.

        Returns whether this was a tick. A step that the gradient scaler skipped is none: nothing ages and no branch is moved.
        """
        losses, self._losses = self._losses, []
        self.readings.arrive()
        if self._skipped():
            self.branch_optimizer.clear()
            self.objective.pending.clear()
            return False
        self._hear([metric] if metric is not None else losses)
        if self.signal.diverging:
            self._learn_nothing()
        learning = self.registry.in_stage(Stage.TRAINING, *LEARNS_FROM_TASK)
        self.objective.merge()
        self._unscale(learning)
        if self.observer.due:
            self.observer.note_gradients(self._scale)
        factor = self.rate.factor()
        if learning:
            scaled = () if self._scale == 1.0 else (branch.id for branch in learning if branch.stage in BLENDED)
            self.branch_optimizer.step(learning, factor, frozenset(scaled))
        self.advance.gradient_norms = self.branch_optimizer.norms if learning else {}
        self.steps += 1
        if self.steps % self.settings.steps_per_tick == 0:
            self._boundary()
        self.readings.send()
        if self.steps % self.settings.steps_per_tick == 0:
            self.registry.compiled.forget_tallies()
        self._prepare()
        return True

    def _hear(self, losses: list[Tensor | float]) -> None:
        """The step's training loss: the mean of these."""
        if not losses:
            return
        known = [loss for loss in losses if not isinstance(loss, Tensor)]
        there = [loss for loss in losses if isinstance(loss, Tensor)]
        self.readings.post(there, lambda values: self.signal.update(sum(map(float, [*known, *values])) / len(losses)))

    def forget_step(self) -> None:
        """Let nothing be learned from the present step: its forward or backward was not healthy. Call ``tick(None)`` next."""
        self._losses.clear()
        self.readings.forget()
        self._learn_nothing()

    def _learn_nothing(self) -> None:
        self.objective.pending.clear()
        self.objective.failed.clear()
        self.objective.raised.clear()
        self.branch_optimizer.clear()
        self.registry.compiled.forget_tallies()
        for group in (group for layer in self.registry.layers for group in layer.plan):
            take_errors([group])
            group.failures.zero_()
            group.forwards = 0

    def observe(self, values: dict[str, float], primary: str | None = None, maximize: bool = True) -> None:
        """Held-out measurements; published, and the ``primary`` one is what strategies see (turned so that larger is better)."""
        if primary is not None:
            self.advance.metric = values[primary] if maximize else -values[primary]
        self.port.emit(Metrics(tick=self.tick_number, values={key: float(value) for key, value in values.items()}))

    def follow(self, averaged: nn.Module, keep: bool = False) -> None:
        """Let an average of the model grow as the model does: torch's ``AveragedModel``, or any copy that is moved towards it.

        Go on averaging as ever. ``averaged.state_dict()`` stays the host's; what grew in it is in ``state()``, so a loop that goes on
        from one follows its averages anew, in the same order. With ``keep`` the average is what ``export`` and ``save`` give.

        Raises UserError where there is no copy of the model in it.
        """
        follower = Follower(self.registry, averaged, self.known_averages.pop(0) if self.known_averages else None)
        self.followers.append(follower)
        self._kept = follower if keep else self._kept

    def close(self, status: str = "FINISHED", summary: dict[str, Any] | None = None) -> None:
        """End of the run: said on the bus; the seed layers stay on the model, for ``export`` and ``save``."""
        self.readings.arrive()
        self.port.ended(self.tick_number, status, summary or {})
        self.replay.close()
        self.port.close()

    # --- a tick ---

    def _publish_kernel_alerts(self) -> None:
        kernels = self.registry.kernels
        while kernels is not None and kernels.alerts:
            self.gates.said.add(MISMATCH)  # saved with the run, which keeps to torch when it is resumed
            self.port.emit(Alert(tick=self.tick_number, level="error", code=MISMATCH, text=kernels.alerts.pop(0)))

    def _boundary(self) -> None:
        self.tick_number += 1
        self.transitions.tick = self.tick_number
        self.gates.say_diverging(self.tick_number)
        self._collect_failures()
        self._publish_kernel_alerts()
        self._measure_counterfactuals()
        self.advance.begin()
        with self.clock.timing("judge"):
            for command in self.port.commands(self.tick_number):
                self._obey(command)
            self.advance.finish(self.tick_number)
        self.registry.refresh()
        if self.observer.due:
            self.observer.publish(self.tick_number)
        self.port.end_tick(self.tick_number)

    def _obey(self, command: Command) -> None:
        if isinstance(command, RequestReport):
            stages, branches = self.registry.table.counts(), self.observer.branch_cards()
            self.port.emit(Report(tick=self.tick_number, command_id=command.id, stages=stages, branches=branches))
            self.port.acknowledge(command.id, "applied", "", self.tick_number)
            return
        status, reason = self.executor.apply(command, self.tick_number)
        self.port.acknowledge(command.id, status, reason, self.tick_number)

    def _collect_failures(self) -> None:
        raised, self.objective.raised = self.objective.raised, {}
        for layer in self.registry.layers:
            raised |= take_errors(layer.plan)
        self._post_failures()
        rates, self.rates = self.rates, {}
        rates.update(dict.fromkeys(self.objective.failed, 1.0))
        rates.update(dict.fromkeys(self.branch_optimizer.failures, 1.0))
        scaled = "" if self._scale == 1.0 else f", {PATIENCE} steps in a row under a loss scale of {self._scale:g}"
        for branch in self.branch_optimizer.failures:
            self.advance.trouble[branch] = f"its gradient was not finite{scaled if branch in self.branch_optimizer.scaled else ''}"
        self.objective.failed.clear()
        self.branch_optimizer.failures.clear()
        self.advance.trouble |= self.faults.note(raised, self.tick_number)
        self.advance.error_rates = rates
        for branch, rate in ((self.registry.branches[number], rate) for number, rate in rates.items()):
            if branch.stage is Stage.FOSSILIZED and rate > 0 and not branch.unsound:
                site = self.registry.sites[branch.site].name
                text = f"the fossilized branch {branch.id} at {site} gives non-finite values; they are left out until it recovers"
                self.port.emit(
                    Alert(tick=self.tick_number, level="error", code="fossil_not_finite", text=text, site=site, seed=branch.seed)
                )
            branch.unsound = rate > 0

    def _post_failures(self) -> None:
        """In which share of its forwards each branch was contained: what ``_collect_failures`` finds, now or at the next tick."""
        compiled = self.registry.compiled
        if compiled.sites and not self.replay.asleep:
            members = [compiled.members(number) for number in range(len(compiled.sites))]
            self.readings.post(compiled.tallies(), partial(self._note_tallies, members))
        groups = [group for layer in self.registry.layers for group in layer.plan if group.forwards]
        if groups:
            shares = [group.failures / group.forwards for group in groups]
            self.readings.post(shares, partial(self._note_shares, [group.branches for group in groups]))
        for group in groups:
            group.failures.zero_()
            group.forwards = 0

    def _note_tallies(self, members: list[dict[int, int]], values: list[Tensor]) -> None:
        for mine, tally, forwards in zip(members, values[: len(members)], values[len(members) :], strict=True):
            if mine and float(forwards) > 0.0:
                found = (tally / forwards).tolist()
                self.rates.update((branch, found[seed]) for seed, branch in mine.items())

    def _note_shares(self, names: list[list[int]], shares: list[Tensor]) -> None:
        for branches, found in zip(names, shares, strict=True):
            self.rates.update(zip(branches, found.tolist(), strict=True))

    def _measure_counterfactuals(self) -> None:
        if self._last_batch is None or self.tick_number % self.settings.telemetry.every:
            return
        model = self.registry.model
        for branch in self.registry.in_stage(Stage.GRAFTING):
            if "counterfactual" not in signals_of(self.transitions.strategies[branch.strategy]):
                continue
            with self.clock.timing("judge"), torch.no_grad(), untouched_buffers(model), self.observer.silent():
                on = self._measured_loss()
                with self.registry.without(branch):
                    off = self._measured_loss()
            self.advance.counterfactual[branch.id] = off - on

    def _measured_loss(self) -> float:
        key = ("counterfactual", self.registry.structure(), shapes_of(self._last_batch))
        with self.replay.again(), self.meter.counting("objective", key):
            return float(self.loss(self.registry.model, self._last_batch).mean())

    def _unscale(self, learning: list[Branch]) -> None:
        """Undo the loss scale where the task's gradient came in; what an objective gave was never scaled."""
        if self._scale == 1.0:
            return
        for branch in learning:
            bank = self.registry.layers[branch.site].bank(branch.blueprint)
            if branch.stage in BLENDED:
                bank.scale_gradient(branch.slot, 1.0 / self._scale)

    def _prepare(self) -> None:
        """Set up what the next forward must record, and the averages as the model is now."""
        for follower in self.followers:
            follower.sync()
        upcoming = self.tick_number + 1
        last_step = (self.steps + 1) % self.settings.steps_per_tick == 0
        self.observer.prepare(upcoming if last_step else 0)
        if self.registry.kernels is not None:
            self.registry.kernels.begin(upcoming)
        self.replay.wanted = bool(self.registry.in_stage(Stage.TRAINING, Stage.GRAFTING))
        layers = self.registry.layers
        asleep = not self.replay.wanted and not any(layer.plan for layer in layers)
        if asleep != self.replay.asleep:
            for hidden in (self.replay, *layers):
                hidden.asleep = asleep  # all at once, so that a compiled host has no more graphs than it needs

    def _skipped(self) -> bool:
        return self.scaler is not None and float(self.scaler.get_scale()) < self._scale

    # --- cost ---

    def _count(self, batch: Any) -> None:
        key = (self.registry.structure(), shapes_of(batch))
        if not self.meter.knows("step", key):
            self._rehearse(key, batch)
        self.meter.add("step", key)

    def _rehearse(self, key: Any, batch: Any) -> None:
        """Run the step's forward and backward once more under torch's counter, leaving no trace."""
        model = self.registry.model
        parameters = [p for p in model.parameters() if p.requires_grad]
        with self.replay.again(), untouched_buffers(model), self.observer.silent(), self.meter.learning("step", key):
            with torch.enable_grad():
                loss = self.loss(model, batch).mean()
                refuse_reentrant(loss)
                if parameters and loss.requires_grad:
                    torch.autograd.grad(loss, parameters, allow_unused=True)

    # --- travelling ---

    def state(self) -> dict[str, Any]:
        """A copy of all but the host and its optimizer, taken between two steps: plain values and tensors on the CPU.

        With host and optimizer as they were, ``attach(state=…)`` goes on from it with the same bits.
        """
        return dict(join(*split(attached_state(self))))

    def host_state(self) -> dict[str, Tensor]:
        """The host's own part of ``model.state_dict()``, which the model takes back before anything is attached to it."""
        return {name: value for name, value in self.registry.model.state_dict().items() if f"{ATTRIBUTE}." not in name}

    def save_branches(self, folder: str | Path) -> Path:
        """Write ``state()`` as a checkpoint under ``folder``; returns its path, which ``attach(state=…)`` takes."""
        return store.write(store.copy(attached_state(self), self.steps, self.tick_number, topology(self), None), Path(folder)).path

    def load_branches(self, saved: str | Path | dict[str, Any]) -> None:
        """Take over the seeds and branches of a ``state()``, or of what ``save_branches`` wrote; the host stays as it is.

        Raises UserError for another host, other sites, or a file that is not whole.
        """
        load_grow(self, read_state(saved)["grow"])
        self._prepare()

    # --- the end ---

    def export(self) -> nn.Module:
        """A plain module with everything that grew and nothing else: see ``esper.seeds.exporting``."""
        return self._exported()[0]

    def save(self, folder: str | Path, host: dict[str, Any] | None = None) -> Path:
        """The exported model as safetensors with a description, into ``folder``: see ``esper.export.saved_model``, which loads it again."""
        from esper.export.saved_model import save_model

        return save_model(folder, *self._exported(), host)

    def _exported(self) -> tuple[nn.Module, list[Any]]:
        from esper.seeds.exporting import export_with_cards

        with nullcontext() if self._kept is None else self._kept.applied():
            return export_with_cards(self.registry)


def _as_float32(value: float) -> float:
    """The value as alphas hold it: 0.7 is not reached by the float32 next below it."""
    return float(torch.tensor(value, dtype=torch.float32))
