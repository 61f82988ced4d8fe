"""The training loop. There is one: a host without growth is a host whose seeds stay dormant."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from esper.blueprints import Block, Blueprint
from esper.checkpoint.shards import put_in
from esper.checkpoint.tree import fitting, kept
from esper.distributed import Ranks, is_shard
from esper.distributed.sharding import make_whole, mesh_of, put
from esper.engine.attach import attach
from esper.engine.extra_passes import freeze_statistics, host_buffers, host_parameters
from esper.engine.grow import Grow
from esper.engine.judging.judge import RECENT
from esper.engine.port import NullPort, Port
from esper.engine.snapshot import optimizer_state, restore_optimizer
from esper.errors import UserError
from esper.feature_flags import FlagsConfig
from esper.grafting import GraftingConfig
from esper.kernels import KernelConfig
from esper.lifecycle import LifecycleConfig
from esper.lifecycle.duration import parse
from esper.messages import Alert
from esper.randomness import GlobalDraws, seed_for, seed_global_draws
from esper.seeds import SitesConfig, TelemetryConfig
from esper.tasks.base import Task
from esper.tasks.loading import Batches
from esper.trainer.config import OptimizerConfig, TrainerConfig
from esper.trainer.device import TYPES, is_out_of_memory
from esper.trainer.evaluation import Outcome, Repeated, evaluate, held_out
from esper.trainer.global_batch import GlobalBatch
from esper.trainer.governor import Anomaly, Governor, GovernorSettings
from esper.trainer.parts import allowed_steps, averaged, fused, learning_of, optimizer_for, refuse_sparse, refuse_unshardable
from esper.trainer.schedule import Schedule
from esper.trainer.sharded_host import share_out


@dataclass
class Growth:
    """How the host may grow."""

    sites: SitesConfig
    blueprint: Blueprint | Block
    lifecycle: LifecycleConfig
    grafting: GraftingConfig
    telemetry: TelemetryConfig
    kernel: KernelConfig = field(default_factory=KernelConfig)
    flags: FlagsConfig = field(default_factory=FlagsConfig)
    decided: bool = True
    """Whether anything may ever grow; otherwise the lifecycle's durations do not matter."""


class Trainer:
    """Trains ``host`` on ``task`` for ``steps`` optimizer steps while its seeds live; ``fit`` may be interrupted anywhere."""

    def __init__(
        self,
        host: nn.Module,
        task: Task,
        config: TrainerConfig,
        optimizer: OptimizerConfig,
        scheduler: Schedule,
        growth: Growth,
        seed: int,
        device: torch.device,
        port: Port | None = None,
        steps: int | None = None,
        state: dict[str, Any] | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.config = config
        self.ranks = ranks or Ranks.alone(config.shards)
        self.task = task
        self.device = device
        refuse_sparse(host)
        if config.compile and growth.blueprint.part_of_layer:
            name = growth.blueprint.name
            raise UserError(f"trainer.compile=true cannot see what blueprint={name} listens to: use trainer.compile=false, or another one.")
        self.scheduler = scheduler
        self.model = host.requires_grad_(not config.freeze_host)
        if config.sharded and self.ranks.size > 1:
            refuse_unshardable(optimizer)
            share_out(self.model, device, self.ranks)  # from where it was made: no device has ever to hold the whole host
        self.model.to(device)
        with fitting():
            state = put_in(state, mesh_of(self.model))
        self.port: Port = port or NullPort()
        self.port.decided = growth.decided
        size, workers = config.batch_size, config.num_workers
        share, shares = (self.ranks.share, self.ranks.shards) if self.ranks.shards else (None, 1)
        self.batches = Batches(task.train, size, seed_for(seed, "batches"), task.collate, workers, device, share=share, shares=shares)
        self.steps_per_epoch = config.steps_per_epoch(self.batches.length)
        self.total = steps or allowed_steps(config, task, self.batches.length)
        self.validation = held_out(task, "validation", device)
        self.optimizer = optimizer_for(optimizer, self.model, task.outputs)
        self.scaler = torch.amp.GradScaler(device.type) if config.precision == "fp16" else None
        self.compiled: Callable[[Any], Tensor] = torch.compile(self.model, mode=config.compile_mode) if config.compile else self.model
        self.average = averaged(config.ema, self.model)
        self.measured = self.model if self.average is None else self.average
        self.outcome = Outcome()
        self.said: set[str] = set()  # alerts that are given once a run
        seed_global_draws(seed_for(seed, "dropout"))  # dropout and other layers of a host know no other generator
        self.grow = self._attach(growth, optimizer, seed, None if state is None else {"grow": state["grow"]})
        if self.average is not None:
            self.grow.follow(self.average, keep=True)
        self.shared = GlobalBatch(self.ranks, self.grow, seed, self._batch, self._mean_loss) if self.ranks.shards else None
        self.governor = Governor(self.grow, self._governor_settings()) if config.governor else None
        if self.governor is not None and self.shared is not None:
            self.governor.loss_of = self.shared.loss_again
        if state is not None:
            self._take_over(state)
        self.skipping: Any = self.optimizer
        """The optimizer, whose fused kernels leave out a step where ``found_inf`` is 1."""
        self.postpones = self.grow.readings.late and fused(self.optimizer) and self.average is None and self.shared is None
        """Whether the governor may judge a step one step later, so that the host never waits for the device."""
        self._publish_every = growth.telemetry.every
        self._validate_every = max(1, parse(config.validate_every).ticks(self.total, self.steps_per_epoch))

    def _attach(self, growth: Growth, optimizer: OptimizerConfig, seed: int, state: dict[str, Any] | None) -> Grow:
        return attach(
            self.model,
            loss=self.loss,
            total_steps=self.total,
            optimizer=self.optimizer,
            sites=growth.sites.match,
            per_site=growth.sites.per_site,
            judge=Repeated(held_out(self.task, "judge", self.device)),
            blueprint=growth.blueprint,
            grafting=growth.grafting,
            lifecycle=growth.lifecycle,
            telemetry=growth.telemetry,
            kernel=growth.kernel,
            flags=growth.flags,
            learning=learning_of(optimizer, self.config.clip),
            warmup=optimizer.branch_warmup,
            steps_per_epoch=self.steps_per_epoch,
            accumulate=self.config.accumulate,
            scaler=self.scaler,
            port=self.port,
            seed=seed,
            debug=self.config.debug,
            state=state,
            ranks=self.ranks,
        )

    def _governor_settings(self) -> GovernorSettings:
        every = max(1, parse(self.config.governor_snapshot).ticks(self.total, self.steps_per_epoch))
        return GovernorSettings(every, self.config.governor_patience, self.config.governor_failures, max(100, self.total // 10))

    # --- checkpoints ---

    def state(self) -> dict[str, Any]:
        """Everything the rest of a run depends on, by reference; taken between two steps."""
        self.grow.readings.arrive()  # first: the governor judges a postponed step by numbers that may still be under way
        cuda = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
        return {
            "host": dict(host_parameters(self.model)),
            "buffers": dict(host_buffers(self.model)),
            "optimizer": optimizer_state(self.optimizer),
            "average": None if self.average is None else {**host_parameters(self.average), **host_buffers(self.average)},
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
            **self.outcome.state(),
            "said": sorted(self.said),
            "rng": GlobalDraws().state() | {"cpu": torch.get_rng_state(), "cuda": cuda},
            "governor": None if self.governor is None else self.governor.state(),
            "grow": self.grow.grown_state(),
        }

    @torch.no_grad()
    def _take_over(self, state: dict[str, Any]) -> None:
        """Load everything of ``state`` but ``grow``, which was loaded before the run was announced."""
        with fitting():
            for kind, tensors in (("host", host_parameters(self.model)), ("buffers", host_buffers(self.model))):
                for name, value in tensors.items():
                    put(value, state[kind][name])
            restore_optimizer(self.optimizer, state["optimizer"])
            if self.scaler is not None and state["scaler"] is not None:
                self.scaler.load_state_dict(kept(state["scaler"]))
            if self.average is not None and state.get("average") is not None:  # else a fork began to average, from the next step on
                for name, value in {**host_parameters(self.average), **host_buffers(self.average)}.items():
                    value.copy_(state["average"][name])  # its branches came with the state of ``grow``
            self.outcome.load(state)
            self.said = set(state["said"])
            self._remember_batches()
            if self.governor is not None and state["governor"] is not None:
                self.governor.load(kept(state["governor"]), self.device)
            GlobalDraws.restore(kept(state["rng"]))
            torch.set_rng_state(state["rng"]["cpu"])
            if self.device.type == "cuda" and state["rng"]["cuda"] is not None:
                torch.cuda.set_rng_state(state["rng"]["cuda"], self.device)

    def _remember_batches(self) -> None:
        """Give the judge the training batches that it would hold at this step; norm statistics are recalibrated on them."""
        if self.grow.judge is not None:
            number = self.outcome.steps * self.config.accumulate
            for earlier in range(max(0, number - RECENT), number):
                self.grow.judge.remember(self._batch(earlier))

    def _batch(self, number: int) -> Any:
        """Micro-batch ``number`` of the run."""
        return self.batches.at(number % self.config.overfit if self.config.overfit else number)

    def loss(self, model: Callable[[Any], Tensor], batch: Any) -> Tensor:
        """Loss of every sample, ``[N]`` float32, in the run's precision."""
        with self._autocast():
            return self.task.sample_loss(model(batch[0]), batch)

    def _mean_loss(self, batch: Any) -> Tensor:
        return self.loss(self.compiled, batch).mean()

    def fit(self, between: Callable[[Trainer], None] | None = None, test: bool = True) -> Outcome:
        """Train to the end, then measure validation and, once, where it is asked for, ``test``; ``between`` is called after every step."""
        with self.ranks.watched_passes():
            return self._fit(between, test)

    def _fit(self, between: Callable[[Trainer], None] | None, test: bool) -> Outcome:
        self.model.train()
        if self.config.freeze_host:
            freeze_statistics(self.model)
        while self.outcome.steps < self.total:
            try:
                self.advance()
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                grown = len(self.grow.registry.branches.living())
                whose = "GPU" if self.device.type == "cuda" else "machine"
                raise UserError(
                    f"The {whose}'s memory is full at step {self.outcome.steps + 1}, with {grown} branches grown; lower "
                    "trainer.batch_size, let fewer or smaller branches grow, or resume from the last checkpoint where more memory is free."
                ) from error
            if between is not None:
                between(self)
        self.outcome.final = {f"validation/{name}": value for name, value in self._measured(self.validation).items()}
        if test:
            tested = self._measured(held_out(self.task, "test", self.device))
            self.outcome.final |= {f"test/{name}": value for name, value in tested.items()}
            self._check_finite("test", tested["loss"])
        self.batches.close()
        make_whole(self.model, self.device)  # for the rest, which is rank 0's alone
        return self.outcome

    def advance(self) -> None:
        """One optimizer step, and the validation that is due after it. Between two calls the state is whole."""
        step = self.outcome.steps
        values, primary = self._step(step), None
        self.outcome.steps = step + 1
        if self.validates(step + 1):
            values, primary = values | self._validate(), f"validation/{self.task.primary}"
        if values:  # once a step: a name has one value at a tick
            self._record(values, primary)

    def validates(self, steps: int) -> bool:
        """Whether the validation set is measured after this many steps."""
        return steps % self._validate_every == 0 or steps == self.total

    def _step(self, step: int) -> dict[str, float]:
        """Make one step. Returns the values to record, none where telemetry is not due."""
        lr_factor = self.scheduler.factor(step, self.total)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * lr_factor
        mean = self._gradients(step)
        norm = self._gradient_norm()
        anomaly = self._anomaly(step, mean, norm)
        if self.governor is not None and anomaly is not None:
            self.optimizer.zero_grad(set_to_none=True)
            self.governor.recover(anomaly, self._seen_at(anomaly.step))
            self.grow.tick(None)
        else:
            if self.average is not None:  # weights with which this step's forward and backward were healthy
                self.average.update_parameters(self.model)
            self._apply()
            if self.governor is not None:
                self.governor.measure()
            self.grow.tick(mean)
        self.optimizer.zero_grad(set_to_none=True)
        return self._said_of(step, float(mean), lr_factor) if (step + 1) % self._publish_every == 0 else {}

    def _gradients(self, step: int) -> Tensor:
        """The mean loss, with the gradients in place."""
        if self.shared is not None:
            parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
            return self.shared.gradients(step, parameters, lambda loss: torch.autograd.backward(self._scaled(loss)))
        losses = []
        for number in range(step * self.config.accumulate, (step + 1) * self.config.accumulate):
            batch = self._batch(number)
            loss = self._mean_loss(batch)
            torch.autograd.backward(self._scaled(loss / self.config.accumulate))
            losses.append(loss.detach())
            self.grow.after_backward(batch, losses[-1])
        return torch.stack(losses).mean()

    def _seen_at(self, step: int) -> Any:
        """What the governor looks at again: the last micro-batch of this step, or the step's number where processes share it out."""
        return step if self.shared is not None else self._batch((step + 1) * self.config.accumulate - 1)

    def _anomaly(self, step: int, loss: Tensor, norm: Tensor | None) -> Anomaly | None:
        """What the governor says of this step, or of the one before if that was postponed; waits for the device where it must."""
        self.skipping.found_inf = None
        if self.governor is None:
            return None
        earlier = self.governor.earlier()
        if earlier is not None:
            return earlier
        if norm is None or self.scaler is not None:  # the scaler skips overflows by itself
            return self.governor.admit(step, float(loss), None)
        if self.postpones and not self.governor.waits(step):
            self.skipping.found_inf = 1.0 - torch.isfinite(loss + norm).float()
            return self.governor.postpone(step, loss, norm)
        values = torch.stack([loss.float(), norm.float()]).tolist()
        return self.governor.admit(step, values[0], values[1])

    def _gradient_norm(self) -> Tensor | None:
        """Clip the host's gradient and return its norm before clipping; None where it is not needed."""
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        if self.config.clip <= 0.0 and self.governor is None:
            return None
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm: Any = nn.utils.clip_grad_norm_(parameters, self.config.clip if self.config.clip > 0.0 else math.inf)
        whole: Tensor = norm.full_tensor() if is_shard(norm) else norm
        return whole

    def _apply(self) -> None:
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()

    def _said_of(self, step: int, loss: float, lr_factor: float) -> dict[str, float]:
        if not math.isfinite(loss) and self.scaler is None and self.governor is None:
            raise UserError(
                f"The training loss is {loss} after step {step + 1}; lower optimizer.lr, check the data, or run with debug=nan, "
                "which names the operation."
            )
        return {"train/loss": loss, "train/lr_factor": lr_factor}

    def _validate(self) -> dict[str, float]:
        values = {f"validation/{name}": value for name, value in self._measured(self.validation).items()}
        for name, value in values.items():
            best = self.outcome.best.get(name)
            if best is None or math.isnan(best) or (value > best if self._maximize(name) else value < best):
                self.outcome.best[name] = value
        self._check_finite("validation", values["validation/loss"])
        return values

    def _measured(self, batches: Batches) -> dict[str, float]:
        return evaluate(self.measured, self.task, batches, self.ranks)

    def _check_finite(self, which: str, loss: float) -> None:
        """Raise an alert, once for each set, that its loss is not a number; if training goes well, the data are the cause."""
        if not math.isfinite(loss) and which not in self.said:
            self.said.add(which)
            text = f"the {which} loss is {loss}; if the training loss is not, look for NaN or infinities in the {which} data"
            self.port.emit(Alert(tick=self.grow.tick_number, level="error", code=f"{which}_not_finite", text=text))

    def _maximize(self, name: str) -> bool:
        metric = self.task.metrics.get(name.split("/", 1)[1])
        return metric is not None and metric.direction == "max"

    def _record(self, values: dict[str, float], primary: str | None = None) -> None:
        tick = self.grow.tick_number
        values = values | {"cost/macs": float(self.grow.meter.total), "params/total": float(self.parameters)}
        self.outcome.history += [(tick, name, value) for name, value in values.items()]
        clock = self.grow.clock
        timed = {
            "cost/steps": float(self.outcome.steps),
            "cost/seconds": clock.total,
            "cost/shadow_seconds": clock.seconds.get("shadow", 0.0),
            "cost/judge_seconds": clock.seconds.get("judge", 0.0),
        }
        self.grow.observe(values | timed, primary, primary is None or self._maximize(primary))

    @property
    def parameters(self) -> int:
        """Parameters of the host and of the branches that are blended in."""
        registry = self.grow.registry
        return self.host_parameters + sum(branch.parameters for number in range(len(registry.sites)) for branch in registry.blended(number))

    @property
    def host_parameters(self) -> int:
        """Parameters of the host alone."""
        return sum(p.numel() for group in self.optimizer.param_groups for p in group["params"])

    def _scaled(self, loss: Tensor) -> Tensor:
        return loss if self.scaler is None else self.scaler.scale(loss)

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.config.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, TYPES[self.config.precision])
