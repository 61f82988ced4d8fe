"""Time and memory of a run, estimated from a few of its own steps on a host that is thrown away."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from esper.blueprints.block_call import first_tensor
from esper.engine.extra_passes import host_buffers, host_parameters
from esper.seeds.sites import quiet_evaluation
from esper.trainer.evaluation import evaluate
from esper.trainer.trainer import Trainer

WARM, LEAST, ENOUGH_S = 3, 5, 1.5
"""Steps that are not timed, fewest that are, and seconds of them that suffice."""


@dataclass
class Forward:
    """One forward of a sample through the bare host: MACs in all and by module, and the shape of every module's output."""

    macs: int
    by_module: dict[str, int]
    shapes: dict[str, tuple[int, ...]]


@dataclass
class Cost:
    """Seconds of a step, of an evaluation and of a pass over the judge set, MACs of a training step, bytes by purpose."""

    step_s: float
    validation_s: float
    judge_s: float
    step_macs: int
    bytes: dict[str, int] = field(default_factory=dict)


def forward_of(trainer: Trainer) -> Forward:
    """Run the host once on a batch under torch's counter; shapes are those of one sample, without the batch's dimension."""
    model = trainer.model
    inputs, targets = trainer.batches.at(0)
    shapes: dict[str, tuple[int, ...]] = {}

    def remember(name: str) -> object:
        def hook(module: nn.Module, given: object, output: object) -> None:
            tensor = first_tensor(output)
            if tensor is not None:
                shapes[name] = tuple(tensor.shape[1:])

        return hook

    handles = [module.register_forward_hook(remember(name)) for name, module in model.named_modules() if name]
    try:
        with quiet_evaluation(model), FlopCounterMode(display=False) as counter:
            model(inputs)
    finally:
        for handle in handles:
            handle.remove()
    root, samples = type(model).__name__, len(targets)
    counted = {name: sum(flops.values()) // 2 // samples for name, flops in counter.get_flop_counts().items()}
    by_module = {name.removeprefix(f"{root}."): macs for name, macs in counted.items() if name.startswith(f"{root}.")}
    return Forward(counter.get_total_flops() // 2 // samples, by_module, shapes)


def cost_of(trainer: Trainer) -> Cost:
    """Time a few training steps without growth. The trainer must not be used afterwards."""
    steps = min(WARM, trainer.total)
    for _ in range(steps):
        trainer.advance()
    taken, began = 0, _now(trainer.device)
    while steps + taken < trainer.total and (taken < LEAST or _now(trainer.device) - began < ENOUGH_S):
        trainer.advance()
        taken += 1
    passed = _now(trainer.device) - began
    began = _now(trainer.device)
    evaluate(trainer.model, trainer.task, trainer.validation)
    validation = _now(trainer.device) - began
    began = _now(trainer.device)
    if trainer.grow.judge is not None:
        trainer.grow.judge.losses([])
    judge = _now(trainer.device) - began
    macs = trainer.grow.meter.spent.get("step", 0) // max(1, trainer.outcome.steps)
    return Cost(passed / taken if taken else 0.0, validation, judge, macs, _bytes(trainer))


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _bytes(trainer: Trainer) -> dict[str, int]:
    parameters = list(host_parameters(trainer.model).values())
    weights = sum(p.numel() * p.element_size() for p in parameters)
    gradients = sum(p.numel() * p.element_size() for p in parameters if p.requires_grad)
    state = [value for values in trainer.optimizer.state.values() for value in values.values() if isinstance(value, Tensor)]
    moments = sum(value.numel() * value.element_size() for value in state)
    buffers = sum(value.numel() * value.element_size() for value in host_buffers(trainer.model).values())
    return {
        "parameters and buffers": weights + buffers,
        "gradients": gradients,
        "optimizer": moments,
        "activations": _activations(trainer, parameters),
        "snapshots to roll back to": (1 + (trainer.governor is not None)) * (weights + buffers + moments),
    }


def _activations(trainer: Trainer, parameters: list[nn.Parameter]) -> int:
    """Bytes that autograd keeps between forward and backward of one micro-batch, parameters not counted."""
    known = {p.untyped_storage().data_ptr() for p in parameters}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = trainer.loss(trainer.model, trainer.batches.at(0)).mean()
        del loss
    return sum(kept.values())
