"""Everything that ``attach`` could do nothing with is told in one sentence, before anything is done."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from growing import Net, batch, sample_loss, short
from torch import Tensor, nn

from esper.blueprints import MLP
from esper.engine.attach import attach
from esper.errors import UserError
from esper.kernels import KernelConfig

X, Y = batch()
COUNTS = {
    "total_steps": "the optimizer steps of the run",
    "per_site": "the seeds that share a site",
    "steps_per_epoch": "the optimizer steps of an epoch",
    "accumulate": "the micro-batches of an optimizer step",
}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    **{f"{name} {value!r}": ({name: value}, f"{name}={value!r} is not accepted: it counts {what}, so give a whole number of at least 1.")
       for name, what in COUNTS.items() for value in (0, -3, 2.5, float("inf"), "100", True, None)},
    "model": ({"model": 3}, "model is an int; seeds grow on a torch.nn.Module."),
    "class": ({"model": Net}, "model is the class Net; seeds grow on a torch.nn.Module."),
    "traced": ({"model": "traced"}, "The model is TorchScript, into which nothing can grow; attach to the module that it was traced"),
    "scripted part": ({"model": "scripted part"}, "The model is TorchScript"),
    "optimizer": ({"optimizer": [1]}, "optimizer is a list; it takes the host's torch.optim.Optimizer, or None."),
    "lifecycle": ({"lifecycle": {"objective": "shadow"}}, "lifecycle is a dict; it takes an esper.lifecycle.LifecycleConfig, as in"),
    "telemetry": ({"telemetry": 10}, "telemetry is an int; it takes an esper.seeds.TelemetryConfig"),
    "learning": ({"learning": 1e-3}, "learning is a float; it takes an esper.engine.learning.branch_optimizer.BranchLearning"),
    "kernel": ({"kernel": "cuda"}, "There is no kernel 'cuda'; there are auto, triton, torch."),
    "kernel's name": ({"kernel": KernelConfig("cuda")}, "There is no kernel 'cuda'"),
    "kernel's kind": ({"kernel": 3}, "kernel is an int; it takes a name or an esper.kernels.KernelConfig."),
    "scaler": ({"scaler": 2.0}, "scaler is a float; it takes the loop's torch.amp.GradScaler, or None."),
    "port": ({"port": 1}, "port is an int; it takes an esper.engine.port.Port, or None."),
    "state": ({"state": 3}, "state is an int; it takes what grow.state() gave"),
    "seed": ({"seed": "a"}, "seed is a str; it takes a whole number."),
    "sites": ({"sites": 3}, "sites is an int; it takes a pattern over module names, a role, or a list of such texts."),
    "sites' parts": ({"sites": [nn.Linear(2, 2)]}, "sites is a list; it takes a pattern"),
    "loss": ({"loss": "low"}, "loss is a str; it takes a function loss(model, batch), or None."),
    "torch's loss": ({"loss": nn.CrossEntropyLoss()}, "loss is CrossEntropyLoss, which takes outputs and targets; give loss(model, batch)"),
    "judge's loss": ({"judge_loss": 3}, "judge_loss is an int; it takes a function"),
    "bare batch": ({"judge": (X, Y)}, "judge is one batch; it takes batches: give [batch], or a DataLoader of data kept for judging."),
    "bare list": ({"judge": [X, Y]}, "judge is one batch"),
    "bare dict": ({"judge": {"x": X, "y": Y}}, "judge is one batch"),
    "bare tensor": ({"judge": X}, "judge is one batch"),
    "judge": ({"judge": 3}, "judge is an int; it takes batches: a list of them, or a DataLoader."),
    "module": ({"blueprint": nn.Linear(2, 2)}, "blueprint is a Linear; it takes a name (affine, low_rank, mlp, glu, conv, block, "),
    "blueprint's class": ({"blueprint": MLP}, "blueprint is the class MLP; give an object of it, as in blueprint=MLP()."),
}  # fmt: skip


def model_of(name: Any) -> Any:
    if name == "traced":
        return torch.jit.trace(Net(), X)
    return nn.Sequential(nn.Linear(6, 6), torch.jit.script(nn.Linear(6, 3))) if name == "scripted part" else name


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("name", list(REFUSED))
def test_a_mistake_is_one_sentence(name: str) -> None:
    changes, words = REFUSED[name]
    model = model_of(changes.get("model", Net()))
    given: dict[str, Any] = {"loss": sample_loss, "total_steps": 400, "judge": [(X, Y)], "lifecycle": short(), "per_site": 2}
    with pytest.raises(UserError) as refusal:
        attach(model, **(given | {key: value for key, value in changes.items() if key != "model"}))
    assert words in str(refusal.value) and str(refusal.value).endswith(".") and "\n" not in str(refusal.value)


class Own(nn.Module):
    """A model that says what it gives: logits, or its own loss in one of the usual forms."""

    def __init__(self, gives: str) -> None:
        super().__init__()
        self.net, self.gives = Net(), gives

    def forward(self, inputs: Tensor, targets: Tensor | None = None) -> Any:
        logits = self.net(inputs)
        loss = None if targets is None else nn.functional.cross_entropy(logits, targets)
        return {"logits": logits, "dict": {"logits": logits, "loss": loss}}[self.gives]


def test_without_a_loss_function_the_models_output_must_hold_its_loss() -> None:
    grow = attach(Own("dict"), judge=[{"inputs": X, "targets": Y}], total_steps=100, lifecycle=short(), per_site=2)
    assert grow.loss(grow.registry.model, (X, Y)).isfinite()
    for gives, data, kind in (("logits", (X, Y), "Tensor"), ("dict", (X,), "dict")):
        sentence = rf"The model gave a {kind} without \.loss: pass loss=…, a function of model and batch, or give labels\.$"
        with pytest.raises(UserError, match=sentence):
            attach(Own(gives), judge=[data], total_steps=100, lifecycle=short(), per_site=2)


def test_a_list_of_tensors_of_one_kind_is_a_list_of_batches() -> None:
    def loss(model: Any, data: Tensor) -> Tensor:
        return model(data).square().mean(1)

    assert attach(Net(), loss=loss, judge=[X, X], total_steps=400, lifecycle=short(), per_site=2).judge is not None
