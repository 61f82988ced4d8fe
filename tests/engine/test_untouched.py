"""Nothing that esper does draws from, or leaves changed, a generator, mode, flag, buffer or environment variable of the user's."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from growing import Net, batch, germinate, sample_loss, short
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from esper import attach, load_model
from esper.blueprints import MLP
from esper.controllers import CONFIGS
from esper.engine.grow import Grow
from esper.randomness import GlobalDraws
from esper.seeds import TelemetryConfig
from esper.seeds.layer import ATTRIBUTE

SCRIPT = [{"at": "2step", "command": "germinate", "site": "fc1", "count": 1}]


class Noisy(Net):
    """A host that draws from every global generator, counts its calls, and does more than set a flag in ``train``."""

    def __init__(self) -> None:
        super().__init__(dropout=0.3, norm=True)
        self.register_buffer("calls", torch.zeros(()))
        self.switched: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1.0
        return super().forward(x + 1e-3 * (random.random() + float(numpy.random.rand())))

    def train(self, mode: bool = True) -> nn.Module:
        if hasattr(self, "switched"):
            self.switched.append(mode)
        return super().train(mode)


class Drawing(MLP):
    """A blueprint that draws its start from the global generators, though it is given one of its own."""

    def initialise(self, *given: Any) -> Any:
        random.random(), numpy.random.rand(), torch.rand(1)
        return super().initialise(*given)


def flags() -> dict[str, Any]:
    """Everything global of torch that a library may set."""
    return {
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "anomaly": torch.is_anomaly_enabled(),
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "warn_only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "precision": torch.get_float32_matmul_precision(),
        "cudnn": (torch.backends.cudnn.enabled, torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic),
        "tf32": (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32),
        "mkldnn": torch.backends.mkldnn.enabled,
        "fastpath": torch.backends.mha.get_fastpath_enabled(),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.is_autocast_cache_enabled()),
        "multithreading": torch.autograd.is_multithreading_enabled(),
    }


class Watched:
    """A user's whole program, to be looked at before and after a call."""

    def __init__(self, workers: int = 0) -> None:
        self.model = Noisy()
        self.model.fc2.bias.requires_grad_(False)
        self.model.norm.eval()
        self.own = torch.Generator().manual_seed(4)
        self.shuffled = torch.Generator().manual_seed(5)
        data = TensorDataset(*batch("mlp", 900, 64))
        sampler = torch.utils.data.RandomSampler(data, generator=self.shuffled)
        self.judge = DataLoader(data, 16, sampler=sampler, generator=self.own, num_workers=workers)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 0.01)

    def everything(self) -> dict[str, Any]:
        """All that is the user's, as values that can be compared."""
        modules = {name: m for name, m in self.model.named_modules() if ATTRIBUTE not in name.split(".")}
        tensors = {name: value for name, value in self.model.state_dict(keep_vars=True).items() if f"{ATTRIBUTE}." not in name}
        return {
            "python": random.getstate(),
            "numpy": str(numpy.random.get_state()),
            "torch": torch.get_rng_state().tolist(),
            "generators": [self.own.get_state().tolist(), self.shuffled.get_state().tolist()],
            "training": {name: module.training for name, module in modules.items()},
            "momenta": {name: module.momentum for name, module in modules.items() if hasattr(module, "momentum")},
            "switched": list(self.model.switched),
            "values": {name: value.detach().tolist() for name, value in tensors.items()},
            "places": {name: value.data_ptr() for name, value in tensors.items()},
            "requires_grad": {name: value.requires_grad for name, value in tensors.items()},
            "gradients": {name: None if value.grad is None else value.grad.tolist() for name, value in tensors.items()},
            "groups": [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups],
            "flags": flags(),
            "environ": dict(os.environ),
            "folder": os.getcwd(),
        }

    @contextmanager
    def untouched(self, call: str) -> Iterator[None]:
        """Assert that what happens inside leaves everything as it is."""
        before = self.everything()
        yield
        after = self.everything()
        for name, value in before.items():
            assert after[name] == value, f"{call} changed the user's {name}"


def settings(watched: Watched, **changes: Any) -> dict[str, Any]:
    """Arguments under which a first branch germinates soon and is looked at by everything that esper has."""
    given: dict[str, Any] = {
        "loss": sample_loss,
        "optimizer": watched.optimizer,
        "total_steps": 100,
        "judge": watched.judge,
        "sites": ["fc1"],
        "per_site": 2,
        "lifecycle": short(),
        "telemetry": TelemetryConfig(every=2),
        "blueprint": Drawing(),
        "grafting": "performance",
        "controller": CONFIGS["scheduled"](script=SCRIPT),
    }
    return given | changes


def steps(watched: Watched, grow: Grow, until: Callable[[], bool]) -> None:
    """A loop in which only the user's own lines may change anything."""
    for number in range(100):
        data = batch("mlp", number)
        loss = sample_loss(watched.model, data).mean()
        loss.backward()
        with watched.untouched("after_backward"):
            grow.after_backward(data)
        watched.optimizer.step()
        with watched.untouched("tick"):
            grow.tick(loss.detach())
        watched.optimizer.zero_grad()
        if until():
            return
    raise AssertionError("the branch never got there")


@pytest.mark.parametrize("objective", ["shadow", "functional_gradient", "reconstruction"])
def test_every_call_of_a_loop_leaves_all_that_is_the_users(objective: str, tmp_path: Path) -> None:
    watched = Watched()
    lifecycle = short(objective=objective)
    with watched.untouched("attach"):
        grow = attach(watched.model, **settings(watched, lifecycle=lifecycle))
    steps(watched, grow, lambda: bool(grow.registry.table.looks.any()))
    branch = grow.registry.branches[0]
    calls: dict[str, Callable[[], Any]] = {
        "judge": lambda: grow.judge.look([branch], [0.05]),  # type: ignore[union-attr]
        "observe": lambda: grow.observe({"validation/loss": 0.5}, "validation/loss", maximize=False),
        "state": grow.state,
        "host_state": grow.host_state,
        "save_branches": lambda: grow.save_branches(tmp_path / "branches"),
        "load_branches": lambda: grow.load_branches(tmp_path / "branches"),
        "export": grow.export,
        "save": lambda: grow.save(tmp_path / "model"),
        "command": lambda: grow.executor.apply(germinate("fc1", 1), grow.tick_number),
    }
    for name, call in calls.items():
        with watched.untouched(name):
            call()
    fresh = Noisy()
    with watched.untouched("load_model"):
        load_model(tmp_path / "model", fresh, blueprints=[Drawing])
    with watched.untouched("attach with a state"):
        state = grow.state()
    other = Watched()
    other.model.load_state_dict(grow.host_state())
    with other.untouched("attach with a state"):
        attach(other.model, **settings(other, lifecycle=lifecycle, state=state))
    with watched.untouched("close"):
        grow.close()


def test_a_judge_that_shuffles_gives_every_look_the_same_order() -> None:
    watched = Watched()
    grow = attach(watched.model, **settings(watched))
    assert grow.judge is not None
    first = grow.judge.losses([])
    watched.own.manual_seed(77), watched.shuffled.manual_seed(78), torch.manual_seed(79)
    assert torch.equal(first, grow.judge.losses([])), "losses are paired by their place"


@pytest.mark.usefixtures("processes")
def test_workers_of_a_judging_loader_move_no_generator() -> None:
    watched = Watched(workers=1)
    with watched.untouched("attach"):
        grow = attach(watched.model, **settings(watched))
    with watched.untouched("judge"):
        grow.judge.losses([])  # type: ignore[union-attr]


def test_a_host_with_dormant_seeds_and_a_judging_loader_trains_as_alone() -> None:
    """The run of the report: a DataLoader as judge moved the global generator, and with it every dropout mask."""

    def run(seeds: bool) -> list[float]:
        torch.manual_seed(0), random.seed(0), numpy.random.seed(0)
        watched = Watched()
        torch.manual_seed(1)
        grow = attach(watched.model, **settings(watched, controller="none")) if seeds else None
        losses = []
        for number in range(4):
            data = batch("mlp", number)
            loss = sample_loss(watched.model, data).mean()
            loss.backward()
            watched.optimizer.step()
            if grow is not None:
                grow.after_backward(data, loss.detach())
                grow.tick(loss.detach())
            watched.optimizer.zero_grad()
            losses.append(float(loss.detach()))
        return losses

    assert run(True) == run(False)


def test_a_state_of_the_global_draws_gives_the_same_draws_again() -> None:
    random.gauss(0, 1), numpy.random.randn()  # each keeps a second normal draw back
    state = GlobalDraws().state()
    first = [random.gauss(0, 1), random.random(), float(numpy.random.randn()), float(numpy.random.rand())]
    GlobalDraws.restore(state)
    assert first == [random.gauss(0, 1), random.random(), float(numpy.random.randn()), float(numpy.random.rand())]
