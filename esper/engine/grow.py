"""``Grow``: the small API by which a training loop grows its model; esper's own loop uses it too.

In any loop: ``after_backward(batch)`` after the backward pass of a (micro-)batch, ``tick(loss)`` after the optimizer's
step, ``observe(…)`` when a held-out metric was measured, ``export()`` at the end.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from esper.checkpoint.shards import put_in
from esper.checkpoint.tree import fitting, join, kept, split
from esper.distributed import Ranks, whole
from esper.distributed.sharding import is_sharded, mesh_of
from esper.engine.agreement import Agreement
from esper.engine.arguments import GrowSettings
from esper.engine.branch_replacement import Replacing
from esper.engine.commands import Executor
from esper.engine.costs import Compiling, Meter, Stopwatch
from esper.engine.device_readings import Readings
from esper.engine.extra_passes import DropoutReplay, host_parameters
from esper.engine.judging.gatekeeper import Gatekeeper
from esper.engine.judging.guard import Guard
from esper.engine.judging.judge import Judge, LossFunction
from esper.engine.learning.branch_optimizer import BranchOptimizer, HostRate
from esper.engine.learning.objectives import Objective
from esper.engine.measurements import ExtraPasses, Faults, Measurements
from esper.engine.port import NullPort, Port, memory_of
from esper.engine.saved_state import host_alone, read_state, refuse_misfit, refuse_scattered, topology, write_state
from esper.engine.signals import GraftingSignals, LossSignal
from esper.engine.telemetry import Observer
from esper.engine.tick import TickBoundary
from esper.engine.transitions import Transitions
from esper.engine.weight_averages import Follower
from esper.kernels import MISMATCH
from esper.lifecycle import Machine, Stage
from esper.lifecycle.transitions import BLENDED, LEARNS_FROM_TASK
from esper.messages import Metrics
from esper.seeds import SeedRegistry


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
        ranks: Ranks,
        state: dict[str, Any] | None = None,
    ) -> None:
        self.registry = registry
        self.settings = settings
        self.loss = loss
        self.optimizer = rate.optimizer
        self.host_rate = rate
        self.scaler = scaler
        self.port: Port = NullPort() if port is None else port
        self.meter = Meter(registry.kernels)
        self.clock, self.compiling = Stopwatch(), Compiling()
        self.replay = DropoutReplay(registry.model)
        self.signal = LossSignal()
        self.device = next(iter(host_parameters(registry.model).values())).device
        self.readings = Readings(self.device)
        self.tick_number = 0
        config, ages = settings.lifecycle, settings.ages
        self.machine = Machine(registry.table, ages, config.reseed, config.training_slots)
        self.objective = Objective(config.objective, registry, loss, self.replay, self.meter, self.readings)
        self.objective.micro_batches, self.objective.in_graph.counts = settings.accumulate, settings.count_macs
        self.transitions = Transitions(registry, self.machine, settings.grafting, self.objective, self.port, self.optimizer)
        self.transitions.ranks = ranks
        self.agreement = Agreement(ranks, registry, self.objective, self.meter)
        self.judge = None if judge is None else Judge(registry, judge_loss or loss, judge, self.device, self.meter, ranks)
        self.guard = Guard(self.transitions, self.judge if config.guard else None, self.signal, config.significance, ages.judge_every)
        strategies = self.transitions.strategies
        # as alphas hold it: 0.7 is not reached by the float32 next below it
        ramp_end = {name: float(torch.tensor(strategy.alpha_max, dtype=torch.float32)) for name, strategy in strategies.items()}
        self.gates = Gatekeeper(config, registry, self.judge, self.objective, self.signal, self.guard, self.port, ramp_end)
        self.faults = Faults(registry, self.port, self.gates.said, settings.debug)
        self.replacing = Replacing(config, ages, self.transitions, self.gates)
        self.branch_optimizer = BranchOptimizer(registry, settings.learning, self.readings)
        self.observer = Observer(registry, settings.telemetry, self.objective, self.readings, self.port, lambda: self.tick_number)
        self.passes = ExtraPasses(registry, loss, self.replay, self.meter, self.clock, self.observer.silent)
        self.strategy_signals = GraftingSignals(registry, strategies, self.signal, ages.ramp)
        asks = partial(self.strategy_signals.asks, signal="counterfactual")
        self.measurements = Measurements(
            registry, self.objective, self.branch_optimizer, self.readings, self.faults, self.passes, asks, settings.telemetry.every
        )
        self.measurements.agreement = self.agreement if ranks.size > 1 else None
        self.executor = Executor(self.transitions, self.gates, self.strategy_signals, self.replacing, self.observer.row)
        self.boundary = TickBoundary(
            config,
            ages,
            self.transitions,
            self.gates,
            self.guard,
            self.measurements,
            self.strategy_signals,
            self.executor,
            self.observer,
            self.faults,
            self.replacing,
            self.clock,
            self.agreement,
        )
        self._scale = 1.0
        self.followers: list[Follower] = []
        self.known_averages: list[dict[str, Any]] = []  # of a state that is gone on from, in the order in which they were followed
        self._kept: Follower | None = None
        self._losses: list[Tensor | float] = []
        self.steps = 0
        self._begin(state)

    def _begin(self, state: dict[str, Any] | None) -> None:
        """Announce that the run starts, or continues from ``state``."""
        if state is not None:
            self._take_over(state["grow"])
            if self.judge is not None:
                self.judge.load(state, self.device)
            self.agreement.reset(self.steps)
        self.port.started(self.tick_number, self.settings.total_ticks, self.observer.site_cards())
        self.registry.refresh()
        self._prepare()

    # --- the loop's calls ---

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def after_backward(self, batch: Any, loss: Tensor | float | None = None) -> None:
        """Call after ``loss.backward()`` of each micro-batch, with that batch as the model saw it (on its device).

        TRAINING seeds learn here. ``loss`` (unscaled, not divided for accumulation) saves a measuring forward, and is used
        where ``tick`` is given none.
        """
        loss = loss.detach() if isinstance(loss, Tensor) else loss
        self._losses += [] if loss is None else [loss]
        self._scale = 1.0 if self.scaler is None else float(self.scaler.get_scale())
        self.measurements.note_batch(batch, self._scale)
        self.set_aside()
        if self.settings.count_macs:
            self.passes.count(batch, self.agreement.ranks)
        if self.judge is not None:
            self.judge.remember(batch)
        if self.registry.in_stage(Stage.TRAINING):
            with self.clock.timing("shadow"):
                self.objective.learn(batch, 1.0 / self.settings.accumulate, loss, self.tick_number)
        self.agreement.note_micro_batch()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def set_aside(self) -> None:
        """Under a gradient scaler: keep the branches' gradients, which only a tick unscales, out of clipping before the tick.

        ``after_backward`` calls it. Call it yourself, right after the backward pass, only if you clip before ``after_backward``.
        """
        if self.scaler is not None:
            self.objective.set_aside(parameter for layer in self.registry.layers for parameter in layer.parameters())

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def tick(self, metric: Tensor | float | None = None) -> bool:
        """Call after ``optimizer.step()``; ``metric`` is the step's training loss, else the mean of the losses given to ``after_backward``.

        Returns whether this was a tick. A step that the gradient scaler skipped is not one: no seed ages and no branch moves.
        """
        losses, self._losses = ([metric] if metric is not None else self._losses), []
        self.readings.arrive()
        if self.signal.diverging and self.readings.late:
            self.forget_arrived()
        self.objective.excuse(self.branch_optimizer.failures)
        if self._skipped():
            self.branch_optimizer.clear()
            self.objective.pending.clear()
            return False
        self._hear(self.agreement.begin(losses))
        if self.signal.diverging:
            self._learn_nothing()
        learning = self.registry.in_stage(Stage.TRAINING, *LEARNS_FROM_TASK)
        self.objective.merge()
        if learning:
            self.agreement.average_gradients()
        self.branch_optimizer.unscale(learning, self._scale)
        if self.observer.due:
            self.observer.note_gradients(self._scale)
        factor = self.host_rate.factor()
        if learning:
            scaled = () if self._scale == 1.0 else (branch.id for branch in learning if branch.stage in BLENDED)
            self.branch_optimizer.step(learning, factor, frozenset(scaled))
        self.measurements.note_gradients(self.branch_optimizer.norms if learning else {})
        self.steps += 1
        if at_boundary := self.steps % self.settings.steps_per_tick == 0:
            self.tick_number += 1
            self.boundary.run(self.tick_number)
        self.readings.send()
        if at_boundary:
            self.registry.compiled.reset_counts()
        self.agreement.end(self.tick_number, self.observer.due or self.agreement.step == 0)
        self._prepare()
        return True

    def _hear(self, losses: list[Tensor | float]) -> None:
        """The step's training loss: the mean of these."""
        if not losses:
            return
        known = [float(loss) for loss in losses if not isinstance(loss, Tensor)]
        there = [loss for loss in losses if isinstance(loss, Tensor)]
        self.readings.post(there, lambda values: self.signal.update(sum([*known, *map(float, values)]) / len(losses)))

    def forget_step(self) -> None:
        """Let nothing be learned from the present step: its forward or backward was not healthy. Call ``tick(None)`` next."""
        self._losses.clear()
        self.readings.forget()
        self._learn_nothing()

    def forget_arrived(self) -> None:
        """Let no failure count that the device told of the step before: that step was not healthy, and was made all the same."""
        self.branch_optimizer.failures.clear()
        self.objective.failed.clear()
        self.measurements.error_rates.clear()

    def _learn_nothing(self) -> None:
        self.objective.pending.clear()
        self.objective.failed.clear()
        self.objective.raised.clear()
        self.branch_optimizer.clear()
        self.registry.compiled.reset_counts()
        self.measurements.forget_step()

    def observe(self, values: dict[str, float], primary: str | None = None, maximize: bool = True) -> None:
        """Held-out measurements, which are published; strategies see the ``primary`` one (turned so that larger is better)."""
        if primary is not None:
            self.measurements.observe(values[primary] if maximize else -values[primary])
        self.port.emit(Metrics(tick=self.tick_number, values={key: float(value) for key, value in values.items()}))

    def follow(self, averaged: nn.Module, keep: bool = False) -> None:
        """Let an average of the model grow as the model does: torch's ``AveragedModel``, or any copy that is moved towards it.

        Continue averaging as before. ``averaged.state_dict()`` remains that of the host. The averaged branches are in ``state()``, so a
        loop that resumes from one calls ``follow`` again for its averages, in the same order. With ``keep``, ``export`` and ``save`` give
        the average.

        Raises UserError where there is no copy of the model in it, and for a model that FSDP shards.
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

    # --- a step ---

    def _prepare(self) -> None:
        """Set up the recordings of the next forward, and bring the averages up to date with the model."""
        for follower in self.followers:
            follower.sync()
        upcoming = self.tick_number + 1
        last_step = (self.steps + 1) % self.settings.steps_per_tick == 0
        self.observer.prepare(upcoming if last_step else 0)
        if self.registry.kernels is not None:
            self.registry.kernels.begin_tick(upcoming)
        self.replay.wanted = bool(self.registry.in_stage(Stage.TRAINING, Stage.GRAFTING))
        layers = self.registry.layers
        asleep = not self.replay.wanted and not any(layer.groups for layer in layers)
        if asleep != self.replay.asleep:
            for hidden in (self.replay, *layers):
                hidden.asleep = asleep  # all at once, so that a compiled host has no more graphs than it needs

    def _skipped(self) -> bool:
        return self.scaler is not None and float(self.scaler.get_scale()) < self._scale

    # --- saving, and going on ---

    def state(self) -> dict[str, Any]:
        """A copy of all but the host and its optimizer, taken between two steps: plain values and tensors on the CPU.

        With the host and optimizer of that moment, ``attach(state=…)`` continues from it with the same bits.
        """
        refuse_scattered(self.agreement.ranks)
        return dict(join(*split(self._whole_state())))

    def _whole_state(self) -> dict[str, Any]:
        """By reference: seeds and branches, the rates that they follow, the judge's batches, the controller's memory."""
        judge = {"recent": []} if self.judge is None else self.judge.state()
        return {"grow": self.grown_state(), **self.host_rate.state(), **judge, "controller": memory_of(self.port)}

    def grown_state(self) -> dict[str, Any]:
        """Everything that seeds and branches depend on, by reference, as the checkpoints of a run hold it."""
        self.readings.arrive()
        return {
            "topology": topology(self.registry),
            "tick": self.tick_number,
            "step": self.steps,
            "garden": self.registry.state(),
            "objective": self.objective.state(),
            "signal": self.signal.state(),
            "counts": self.transitions.state(),
            "guard": self.guard.state(),
            "averages": self.strategy_signals.weights.state(),
            **self.gates.state(),
            "flags": self.registry.flags.state(),
            "refusals": self.executor.state(),
            **self.branch_optimizer.state(),
            **self.measurements.state(),
            "rows": self.observer.state(),
            "followers": [follower.state() for follower in self.followers],
            "macs": self.meter.state(),
            "seconds": self.clock.state(),
        }

    def _take_over(self, state: dict[str, Any]) -> None:
        """Take over a ``grown_state``; the caller prepares the next forward afterwards.

        Raises UserError for a state of another topology, before its tensors are read, and for one that does not fit.
        """
        with fitting():
            refuse_misfit(state.get("topology"), topology(self.registry), "The saved state")
            self.readings.forget()  # what is under way belongs to the state that goes
            state = kept(put_in(state, mesh_of(self.registry.model)))
            self.tick_number = self.transitions.tick = int(state["tick"])
            self.steps = int(state["step"])
            self.registry.load(state["garden"])
            self.measurements.load(state)
            self.objective.load(state["objective"])
            self.signal.load(state["signal"])
            self.transitions.load(state["counts"])
            self.guard.load(state["guard"], self.device)
            self.strategy_signals.weights.load(state["averages"], self.device)
            self.known_averages = list(state.get("followers", []))
            self.gates.load(state)
            before = {"kernels": {"": 1}} if MISMATCH in self.gates.said else {}  # before there were flags, the alert told of a mismatch
            self.registry.flags.load(state.get("flags", before))
            self.executor.load(state["refusals"])
            self.branch_optimizer.load(state)
            self.observer.load(state["rows"])
            self.meter.load(state["macs"])
            self.clock.load(state["seconds"])

    def host_state(self) -> dict[str, Tensor]:
        """The host's own part of ``model.state_dict()``, which the model takes back before anything is attached to it."""
        return host_alone(self.registry.model.state_dict())

    def save_branches(self, folder: str | Path) -> Path:
        """Write ``state()`` as a checkpoint under ``folder``; returns its path, which ``attach(state=…)`` takes.

        Of a host that FSDP shards, all processes call this with one folder, and each writes its parts.
        """
        return write_state(self._whole_state(), Path(folder), self.steps, self.tick_number, self.registry, self.agreement.ranks)

    def load_branches(self, saved: str | Path | dict[str, Any]) -> None:
        """Take over the seeds and branches of a ``state()``, or of a folder of ``save_branches``; the host does not change.

        Raises UserError for another host, other sites, or a file that is not whole.
        """
        self._take_over(read_state(saved)["grow"])
        self._prepare()

    # --- the end ---

    def export(self) -> nn.Module:
        """A plain module with all that grew: see ``esper.seeds.exporting``. All processes call it where FSDP shards the host."""
        return self._exported()[0]

    def save(self, folder: str | Path, host: dict[str, Any] | None = None) -> Path:
        """The exported model as safetensors with a description, into ``folder``: see ``esper.export.saved_model``, which loads it again."""
        from esper.export.saved_model import save_model

        return save_model(folder, *self._exported(), host)

    def exported_values(self) -> AbstractContextManager[None]:
        """Context in which the model has the values that are exported: those of the average that is kept, or its own."""
        return nullcontext() if self._kept is None else self._kept.applied()

    def _exported(self) -> tuple[nn.Module, list[Any]]:
        from esper.seeds.exporting import export_with_cards

        if is_sharded(self.registry.model):
            self.agreement.ranks.come_to("the export")
        with whole(self.registry.model), self.exported_values():
            return export_with_cards(self.registry)
