"""Checks of the arguments of ``attach``, before anything is done with them: one sentence for every mistake."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.loss import _Loss

from esper.blueprints import BLUEPRINTS, Block, Blueprint
from esper.engine.learning.branch_optimizer import BranchLearning
from esper.errors import UserError
from esper.feature_flags import FlagsConfig
from esper.grafting import GraftingConfig
from esper.kernels import KernelConfig
from esper.lifecycle import Ages, LifecycleConfig
from esper.lifecycle.config import OBJECTIVES
from esper.seeds import TelemetryConfig


@dataclasses.dataclass
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


#: The things that each number counts; none makes sense below one.
_COUNTS = {
    "total_steps": "the optimizer steps of the run",
    "per_site": "the seeds that share a site",
    "steps_per_epoch": "the optimizer steps of an epoch",
    "accumulate": "the micro-batches of an optimizer step",
}
#: Kinds of object, and how they are asked for.
_KINDS: dict[str, tuple[type | tuple[type, ...], str]] = {
    "optimizer": (torch.optim.Optimizer, "the host's torch.optim.Optimizer, or None"),
    "lifecycle": (LifecycleConfig, "an esper.lifecycle.LifecycleConfig, as in LifecycleConfig(objective='shadow')"),
    "telemetry": (TelemetryConfig, "an esper.seeds.TelemetryConfig, as in TelemetryConfig(every=20)"),
    "learning": (BranchLearning, "an esper.engine.learning.branch_optimizer.BranchLearning, as in BranchLearning(lr=1e-3)"),
    "flags": (FlagsConfig, "an esper.feature_flags.FlagsConfig, as in FlagsConfig(growth=GrowthFlag(percent=50))"),
    "kernel": ((str, KernelConfig), "a name or an esper.kernels.KernelConfig"),
    "state": ((Mapping, str, Path), "what grow.state() gave, or where save_branches wrote it"),
    "seed": (Integral, "a whole number"),
}
#: The method that an object of any kind must have, and the words for it.
_METHODS = {"scaler": ("get_scale", "the loop's torch.amp.GradScaler"), "port": ("started", "an esper.engine.port.Port")}
_KERNELS = KernelConfig.__dataclass_fields__["name"].metadata["choices"]


def check_arguments(given: dict[str, Any]) -> None:
    """Raise UserError for the first of ``attach``'s arguments, by name, that it could do nothing with."""
    _check_model(given["model"])
    for name, what in _COUNTS.items():
        value = given[name]
        if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
            raise UserError(f"{name}={value!r} is not accepted: it counts {what}, so give a whole number of at least 1.")
    for name, (kind, accepted) in _KINDS.items():
        if given[name] is not None and not isinstance(given[name], kind):
            raise UserError(f"{name} is {_a(given[name])}; it takes {accepted}.")
    kernel = getattr(given["kernel"], "name", given["kernel"])
    if kernel not in _KERNELS:
        raise UserError(f"There is no kernel '{kernel}'; there are {', '.join(_KERNELS)}.")
    for name, (method, accepted) in _METHODS.items():
        if given[name] is not None and not callable(getattr(given[name], method, None)):
            raise UserError(f"{name} is {_a(given[name])}; it takes {accepted}, or None.")
    _check_sites(given["sites"])
    for name in ("loss", "judge_loss"):
        _check_loss(name, given[name])
    _check_judge(given["judge"])
    _check_blueprint(given["blueprint"])
    _check_lifecycle(given["lifecycle"] or LifecycleConfig())


def _check_model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise UserError(f"model is {_a(model)}; seeds grow on a torch.nn.Module.")
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        raise UserError("The model is TorchScript, into which nothing can grow; attach to the module that it was traced or scripted from.")


def _check_sites(sites: Any) -> None:
    if not isinstance(sites, str) and not (isinstance(sites, (list, tuple)) and all(isinstance(one, str) for one in sites)):
        raise UserError(f"sites is {_a(sites)}; it takes a pattern over module names, a role, or a list of such texts.")


def _check_loss(name: str, loss: Any) -> None:
    if isinstance(loss, _Loss):
        kind = type(loss).__name__
        raise UserError(f"{name} is {kind}, which takes outputs and targets; give loss(model, batch), which calls the model and {kind}.")
    if loss is not None and not callable(loss):
        raise UserError(f"{name} is {_a(loss)}; it takes a function loss(model, batch), or None.")


def _check_judge(judge: Any) -> None:
    if judge is None:
        return
    tensors = isinstance(judge, (tuple, list)) and len(judge) > 1 and all(isinstance(part, Tensor) for part in judge)
    if isinstance(judge, (Tensor, Mapping)) or (tensors and (isinstance(judge, tuple) or len({part.dtype for part in judge}) > 1)):
        raise UserError("judge is one batch; it takes batches: give [batch], or a DataLoader of data kept for judging.")
    if isinstance(judge, str) or not isinstance(judge, Iterable):
        raise UserError(f"judge is {_a(judge)}; it takes batches: a list of them, or a DataLoader.")
    if isinstance(judge, Iterator):  # empty after one look, so that every branch would be culled
        kind = type(judge).__name__
        raise UserError(f"judge=… is a {kind}, which can be gone through only once; give a list of batches or a DataLoader.")


def _check_blueprint(blueprint: Any) -> None:
    if isinstance(blueprint, type):
        raise UserError(f"blueprint is the class {blueprint.__name__}; give an object of it, as in blueprint={blueprint.__name__}().")
    if not isinstance(blueprint, (str, Blueprint, Block)):
        names = ", ".join(BLUEPRINTS)
        raise UserError(f"blueprint is {_a(blueprint)}; it takes a name ({names}) or an object derived from esper.blueprints.Blueprint.")
    if not isinstance(blueprint, str):
        _check_settings(blueprint)


def _check_lifecycle(lifecycle: LifecycleConfig) -> None:
    for key, accepted in (("objective", OBJECTIVES), ("clock", ("step", "epoch"))):
        given = getattr(lifecycle, key)
        if given not in accepted:
            raise UserError(f"lifecycle.{key}={given} is not accepted; it takes {' or '.join(accepted)}.")


def _check_settings(blueprint: Blueprint | Block) -> None:
    """Branches are saved with their blueprint's settings: an error now is better than one after the training."""
    for name, value in dataclasses.asdict(blueprint).items():
        try:
            json.dumps(value)
        except (TypeError, ValueError) as error:
            raise UserError(
                f"The setting {name} of blueprint '{blueprint.name}' is {_a(value)}, with which no model could be saved; make it a text, a "
                "number, or a list or dict of them, and let forward look up what it names."
            ) from error


def _a(value: Any) -> str:
    """``a dict``, ``an int``; the class's own name where a class was given."""
    name = f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__
    return name if isinstance(value, type) else f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"
