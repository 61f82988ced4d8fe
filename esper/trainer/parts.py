"""The parts that a training is built from: its length, optimizer, average of the weights, and the learning of branches."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from esper.engine.learning.branch_optimizer import BranchLearning
from esper.engine.learning.muon import BETAS, muon_for
from esper.errors import UserError
from esper.tasks.base import Task
from esper.trainer.config import MuonConfig, OptimizerConfig, TrainerConfig


def allowed_steps(config: TrainerConfig, task: Task, samples: int) -> int:
    """Steps of the run; raises UserError where they need more passes over the training set than the task allows."""
    steps, a_pass = config.total_steps(samples), samples // config.batch_size
    passes = steps * config.accumulate / a_pass
    if task.passes and passes > task.passes and not config.overfit:
        raise UserError(
            f"{steps} steps of {config.batch_size * config.accumulate} samples are {passes:.2f} passes over the {samples} training "
            f"samples, and task.passes={task.passes} allows no more: use trainer.steps={a_pass * task.passes // config.accumulate} or "
            "less, more data, or task.passes=0."
        )
    return steps


def refuse_sparse(host: nn.Module) -> None:
    """Raise UserError for sparse gradients: AdamW and clipping refuse them too, but only in the middle of the first step."""
    for name, module in host.named_modules():
        if getattr(module, "sparse", False) is True:
            raise UserError(
                f"The host's '{name}' gives sparse gradients, which neither the optimizer of this loop nor its clipping takes: build it "
                "with sparse=False, or grow it in a loop of your own with esper.attach."
            )


def refuse_unshardable(config: OptimizerConfig) -> None:
    """Raise UserError for an optimizer that needs whole matrices."""
    if isinstance(config, MuonConfig):
        raise UserError("optimizer=muon turns whole matrices, and trainer=fsdp leaves no process one: use optimizer=adamw, or trainer=ddp.")


def averaged(decay: float, model: nn.Module) -> AveragedModel | None:
    """An exponential moving average of weights and norm statistics; None for a decay of 0."""
    if not decay:
        return None
    moved = get_ema_multi_avg_fn(decay)
    return AveragedModel(model, multi_avg_fn=moved, use_buffers=True)


def optimizer_for(config: OptimizerConfig, model: nn.Module, outputs: int) -> torch.optim.Optimizer:
    parameters = list(model.parameters())
    on_gpu = all(parameter.is_cuda for parameter in parameters)  # one launch a step instead of a dozen
    made: torch.optim.Optimizer
    if isinstance(config, MuonConfig):
        made = muon_for(model, config.lr, config.weight_decay, config.momentum, outputs, config.adamw)
    elif config.name == "sgd":
        made = torch.optim.SGD(parameters, config.lr, momentum=config.momentum, weight_decay=config.weight_decay, fused=on_gpu)
    else:
        made = torch.optim.AdamW(parameters, config.lr, betas=(config.momentum, 0.999), weight_decay=config.weight_decay, fused=on_gpu)
    for group in made.param_groups:
        group["initial_lr"] = config.lr
    return made


def fused(optimizer: torch.optim.Optimizer) -> bool:
    """Whether all its steps are those of a fused kernel, which can leave out a step by itself."""
    return all(group.get("fused") is True for group in optimizer.param_groups)


def learning_of(config: OptimizerConfig, clip: float) -> BranchLearning:
    if isinstance(config, MuonConfig):
        return BranchLearning(config.branch_lr, config.weight_decay, BETAS, clip=clip, rule="muon", momentum=config.momentum)
    return BranchLearning(config.branch_lr, config.weight_decay, clip=clip)
