"""``attach``: put seeds on a model, in one call, for esper's own loop and for every other."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from esper.blueprints import BLUEPRINTS, Block, Heads, LoRA, Width, unshardable
from esper.blueprints.heads import is_attention
from esper.distributed import Ranks
from esper.distributed.sharding import class_name, is_shard, is_sharded, let_go, local
from esper.engine.agreement import refuse_different_starts
from esper.engine.arguments import GrowSettings, check_arguments
from esper.engine.extra_passes import drawing_alike, to_device, untouched_buffers
from esper.engine.grow import Grow
from esper.engine.judging.judge import LossFunction
from esper.engine.learning.branch_optimizer import BranchLearning, HostRate
from esper.engine.learning.inheritance import refuse_uninheritable
from esper.engine.learning.losses import as_tensor_loss, probing
from esper.engine.port import NullPort, Port, controlled_port, remind
from esper.engine.saved_state import read_state
from esper.engine.supported_models import fit
from esper.errors import UserError
from esper.feature_flags import Flags, FlagsConfig
from esper.grafting import CONFIGS as STRATEGIES
from esper.grafting import GraftingConfig, Rule, longest_ramp, strategy_of
from esper.kernels import KernelConfig, Kernels
from esper.lifecycle import Ages, LifecycleConfig, resolve
from esper.lifecycle.duration import parse
from esper.randomness import global_draws_kept
from esper.seeds import SeedRegistry, Site, TelemetryConfig, find_sites
from esper.seeds.block_trial import refuse_rigid, refuse_uncallable_blocks
from esper.seeds.compiled_modules import host_modules
from esper.seeds.layer import device_of
from esper.seeds.registry import AnyBlueprint

SAMPLES_FOR_WIDTH = 64
"""A narrow layer's few outputs may all be positive for one sample; then nothing shows that a ReLU follows."""


@global_draws_kept()
def attach(
    model: nn.Module,
    *,
    total_steps: int,
    loss: Callable[[nn.Module, Any], Any] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    sites: str | list[str] = "auto",
    per_site: int = 4,
    judge: Iterable[Any] | None = None,
    judge_loss: Callable[[nn.Module, Any], Any] | None = None,
    sample: Any = None,
    blueprint: str | AnyBlueprint = "mlp",
    grafting: str | GraftingConfig | Rule = "linear",
    lifecycle: LifecycleConfig | None = None,
    telemetry: TelemetryConfig | None = None,
    learning: BranchLearning | None = None,
    warmup: str = "1%",
    steps_per_epoch: int = 1,
    accumulate: int = 1,
    scaler: Any | None = None,
    kernel: str | KernelConfig = "auto",
    flags: FlagsConfig | None = None,
    controller: Any = None,
    port: Port | None = None,
    seed: int = 0,
    count_macs: bool = True,
    debug: bool = False,
    state: dict[str, Any] | str | Path | None = None,
    ranks: Ranks | None = None,
) -> Grow:
    """Put seeds on ``model`` and return the handle that a training loop calls.

    Args:
        model: the host, already on its device. Its outputs and gradients do not change until something is blended.
        total_steps: optimizer steps of the run; durations in ``%`` refer to it.
        loss: ``loss(model, batch)``: one value (the mean), one a sample, or an output with ``.loss``; default the model's own,
            ``model(**batch).loss``.
        optimizer: the host's; its learning rate is followed and its state kept. Branches never enter it.
        sites: glob patterns over module names, roles (``mlp_hidden``, ``residual``, ``conv_out``), or ``auto``; ``per_site`` seeds
            share each site's features.
        judge: batches kept for judging (anything that can be iterated again and again); without it no branch is kept.
        judge_loss: like ``loss``, one value a sample; default ``loss``.
        sample: a batch that shows shapes; default the first of ``judge``.
        blueprint, grafting: a name, a configured one, or one of your own (``docs/own-blueprint.md``, ``docs/own-strategy.md``).
        learning: AdamW settings of the branches; default follows the optimizer's rate if it is an Adam, else 1e-3.
        scaler: the loop's ``GradScaler``, if it has one.
        kernel: ``auto`` (Triton on a GPU, torch elsewhere), ``triton``, ``torch``, or settings with a canary.
        flags: at which sites growth and kernels are on, as in ``FlagsConfig(growth=GrowthFlag(block=["head"]))`` of
            ``esper.feature_flags``.
        controller: decides about growth: ``heuristic``, another name of ``esper.controllers``, one of their configurations,
            or an object of your own; with ``None`` every seed stays dormant.
        port: a bus to hear and command over, instead of a ``controller`` in this process.
        debug: raise the exceptions of a branch, strategy or controller, instead of continuing without it.
        state: the result of ``grow.state()`` on a model of the same topology, or the path of ``save_branches``, to continue from. The model
            and the optimizer must already have their saved states.
        ranks: the processes that train the model; default those of ``torch.distributed``, each with batches of its own. Rank 0's
            ``controller`` or ``port`` decides for all.

    Raises:
        UserError: an argument of another kind, a pattern that matches no module, a schedule that cannot end, a blueprint that fits no
            site, seeds that are attached already, processes that were not given the same.
    """
    check_arguments(locals())
    model, kept = fit(model), None if state is None else read_state(state)
    lifecycle, loss = lifecycle or LifecycleConfig(), as_tensor_loss(loss)
    branch_kind, strategy, rate = _blueprint(blueprint), _strategy(grafting), HostRate(optimizer, kept)
    _refuse_objective(branch_kind, lifecycle)
    _refuse_sharded(branch_kind, model)
    found = _find_sites(model, branch_kind, sites, per_site, loss, _sample(sample, judge))
    length = _Length(total_steps, steps_per_epoch, lifecycle.clock)
    own = dataclasses.replace(learning or rate.learning(), warmup=parse(warmup).ticks(total_steps, steps_per_epoch) or 1)
    ages = length.ages(lifecycle, strategy, warmup, _decided(port, controller))
    if isinstance(branch_kind, Block):
        refuse_uninheritable(branch_kind.state, optimizer, own)
        ages = dataclasses.replace(ages, untie=length.ticks_of(branch_kind.untie) if branch_kind.untie else None)
    settings = GrowSettings(
        lifecycle=lifecycle,
        ages=ages,
        grafting=strategy,
        telemetry=length.per_tick(telemetry or TelemetryConfig()),
        learning=own,
        total_ticks=length.ticks,
        steps_per_tick=length.steps_per_tick,
        accumulate=accumulate,
        count_macs=count_macs,
        debug=debug,
    )
    registry = _registry(model, found, branch_kind, seed, lifecycle, kernel, flags)
    judged = None if judge_loss is None else as_tensor_loss(judge_loss)
    ranks = Ranks() if ranks is None else ranks
    ranks.sharded = is_sharded(model)
    let_go(model)
    _refuse_mesh(model, ranks)
    refuse_different_starts(ranks, registry, settings, judge, kept)
    port = _port(port, controller, seed, debug, kept, strategy) if ranks.first else NullPort()
    return Grow(registry, settings, loss, judge, judged, rate, scaler, port, ranks, kept)


@dataclasses.dataclass(frozen=True)
class _Length:
    """The run's length, and the ticks that ``clock`` makes of its steps."""

    steps: int
    steps_per_epoch: int
    clock: str

    @property
    def steps_per_tick(self) -> int:
        return self.steps_per_epoch if self.clock == "epoch" else 1

    @property
    def ticks(self) -> int:
        return max(1, self.steps // self.steps_per_tick)

    def ages(self, lifecycle: LifecycleConfig, strategy: GraftingConfig, warmup: str, decided: bool) -> Ages:
        per_epoch = 1 if self.clock == "epoch" else self.steps_per_epoch
        worst = partial(longest_ramp, strategy)
        return resolve(lifecycle, strategy.ramp, warmup, self.ticks, per_epoch, self.steps_per_tick, worst, decided)

    def ticks_of(self, text: str) -> int:
        return parse(text).ticks(self.ticks, 1 if self.clock == "epoch" else self.steps_per_epoch, self.steps_per_tick)

    def per_tick(self, telemetry: TelemetryConfig) -> TelemetryConfig:
        """``every`` counted in ticks: with an epoch's clock, ten of them would leave a controller without news for most of a run."""
        return dataclasses.replace(telemetry, every=max(1, telemetry.every // self.steps_per_tick))


def _registry(
    model: nn.Module,
    sites: list[Site],
    blueprint: AnyBlueprint,
    seed: int,
    lifecycle: LifecycleConfig,
    kernel: str | KernelConfig,
    flags: FlagsConfig | None,
) -> SeedRegistry:
    flagged = Flags(flags, class_name(model))
    flagged.refuse_unmatched([site.name for site in sites])
    kernels = Kernels(KernelConfig(kernel) if isinstance(kernel, str) else kernel, device_of(model), flagged)
    registry = SeedRegistry(model, sites, blueprint, seed, lifecycle.objective != "reconstruction", kernels, flagged)
    registry.reseed = lifecycle.reseed
    registry.layers[-1].forces_grad = not any(p.requires_grad for p in model.parameters())
    return registry


def _find_sites(
    model: nn.Module, blueprint: AnyBlueprint, sites: str | list[str], per_site: int, loss: LossFunction, sample: Any
) -> list[Site]:
    """The sites that match; each can carry the blueprint, or a UserError says why none can."""
    patterns, widens = [sites] if isinstance(sites, str) else list(sites), isinstance(blueprint, Width)
    block, linear = isinstance(blueprint, Block), isinstance(blueprint, LoRA)
    if isinstance(blueprint, Heads) and patterns == ["auto"]:
        patterns = [name for name, module in host_modules(model).items() if is_attention(module)]
        if not patterns:
            raise UserError("blueprint=heads finds no attention layer to which it could add heads in this host; choose another blueprint.")
    forward = probing(loss, model, to_device(sample, device_of(model)), SAMPLES_FOR_WIDTH if widens else 1)
    with untouched_buffers(model):
        seeds = 1 if block or blueprint.part_of_layer else per_site
        found = find_sites(model, patterns, seeds, forward, blocks=block, widths=widens, linear=linear)
        _refuse_misfits(blueprint, found)
        if block:
            refuse_uncallable_blocks(model, found, forward)
        if isinstance(blueprint, Heads):
            refuse_rigid(model, found, forward)
    return found


def _refuse_objective(blueprint: AnyBlueprint, lifecycle: LifecycleConfig) -> None:
    if blueprint.part_of_layer and lifecycle.objective != "shadow":
        raise UserError(
            f"blueprint={blueprint.name} learns by lifecycle.objective=shadow alone, not {lifecycle.objective}: it reads elsewhere."
        )


def _refuse_sharded(blueprint: AnyBlueprint, model: nn.Module) -> None:
    if is_sharded(model) and (reason := unshardable(blueprint)):
        raise UserError(f"blueprint={blueprint.name} cannot grow here: {reason}; use another blueprint, or DistributedDataParallel.")


def _refuse_mesh(model: nn.Module, ranks: Ranks) -> None:
    """Raise UserError for a host whose weights are shared out among others than these processes, or lie elsewhere between passes."""
    shards: list[Any] = [parameter for parameter in model.parameters() if is_shard(parameter)]
    if any(shard.device_mesh.size() != ranks.size for shard in shards):
        raise UserError(
            f"FSDP shares out a part of the host among fewer processes than train together ({ranks.size}), and branches are averaged over "
            "all of them: give fully_shard a mesh of all processes."
        )
    if any(local(shard).device.type != shard.device_mesh.device_type for shard in shards):
        raise UserError("FSDP keeps this host's weights on another device than it computes on; leave CPUOffloadPolicy out.")


def _port(
    port: Port | None, controller: Any, seed: int, debug: bool, state: dict[str, Any] | None, grafting: GraftingConfig
) -> Port | None:
    if controller is not None and port is not None:
        raise UserError("attach takes a controller in this process or a port to one elsewhere, not both.")
    port = port if controller is None else controlled_port(controller, seed, debug, grafting)
    remind(port, (state or {}).get("controller"))
    return port


def _decided(port: Port | None, controller: Any) -> bool:
    """Whether anything may ever grow; a port may say that no command will come over it."""
    return getattr(controller, "name", controller) != "none" and bool(getattr(port, "decided", True))


def _blueprint(blueprint: str | AnyBlueprint) -> AnyBlueprint:
    if not isinstance(blueprint, str):
        return blueprint
    if blueprint not in BLUEPRINTS:
        raise UserError(f"There is no blueprint '{blueprint}'; there are {', '.join(BLUEPRINTS)}.")
    made: AnyBlueprint = BLUEPRINTS[blueprint]()
    return made


def _strategy(grafting: str | GraftingConfig | Rule) -> GraftingConfig:
    if isinstance(grafting, GraftingConfig):
        return grafting
    if not isinstance(grafting, str):
        return strategy_of(grafting)
    if grafting not in STRATEGIES:
        raise UserError(f"There is no grafting strategy '{grafting}'; there are {', '.join(STRATEGIES)}.")
    made: GraftingConfig = STRATEGIES[grafting]()
    return made


def _refuse_misfits(blueprint: AnyBlueprint, sites: list[Site]) -> None:
    reasons = {site.name: blueprint.misfit(site.geometry) for site in sites}
    if isinstance(blueprint, Block):
        reasons = {site.name: reasons[site.name] or blueprint.silencing_misfit(site.module) for site in sites}
    if sites and all(reason is not None for reason in reasons.values()):
        name, reason = next(iter(reasons.items()))
        raise UserError(f"blueprint '{blueprint.name}' fits none of the {len(sites)} sites; at '{name}': {reason}.")


def _sample(sample: Any, judge: Iterable[Any] | None) -> Any:
    if sample is not None:
        return sample
    if judge is None:
        raise UserError("attach needs to see one batch: pass judge=… (batches kept for judging) or sample=….")
    with drawing_alike(judge):
        for batch in judge:
            return batch
    raise UserError("judge=… holds no batch, so nothing could be judged; pass the batches kept for judging, or none at all.")
