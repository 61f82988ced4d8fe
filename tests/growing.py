"""Small hosts, short lifecycles and a training loop of a few lines, for tests that grow something."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from esper.engine.attach import attach
from esper.engine.grow import Grow
from esper.engine.port import NullPort
from esper.hosts.config import CNNConfig, TransformerConfig
from esper.lifecycle import LifecycleConfig, Stage
from esper.messages import Alert, GateResult, Germinate, Message, Metrics, Report, Selector, SetStage, Transition
from esper.seeds import Branch, TelemetryConfig

Batch = tuple[Tensor, Tensor]

#: A run of 80 steps in which branches live for about 15, with a checkpoint every 8.
SHORT_LIVES = [
    "trainer.steps=80",
    "trainer.batch_size=32",
    "trainer.control=false",
    "trainer.checkpoint_every=10%",
    "trainer.checkpoint_keep=50",
    "trainer.validate_every=10%",
    "telemetry.every=2",
    "lifecycle.fine_tuning_min=5%",
    "lifecycle.embargo=2%",
]


def short(**changes: Any) -> LifecycleConfig:
    """A lifecycle of a few ticks a stage, with gates that open by themselves unless ``changes`` say otherwise."""
    ages = {
        "germinated_max": "50step",
        "training_min": "2step",
        "training_max": "60step",
        "grafting_max": "60step",
        "stabilization_min": "2step",
        "stabilization_max": "60step",
        "evaluating_min": "2step",
        "evaluating_max": "20step",
        "fine_tuning_min": "2step",
        "fine_tuning_max": "20step",
        "fade": "3step",
        "embargo": "2step",
        "judge_every": "3step",
    }
    return LifecycleConfig(**(ages | {"readiness": -1.0, "stability": 0.0} | changes))


class Net(nn.Module):
    """An MLP of 6 → 8 → 7 → 3 features, with an in-place ReLU as users write it."""

    def __init__(self, dropout: float = 0.0, norm: bool = False) -> None:
        super().__init__()
        self.fc1 = nn.Linear(6, 8)
        self.norm = nn.BatchNorm1d(8) if norm else nn.Identity()
        self.act1 = nn.ReLU(inplace=True)
        self.drop = nn.Dropout(dropout)
        self.fc2 = nn.Linear(8, 7)
        self.head = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, 6] → [N, 3]``."""
        hidden = self.drop(self.act1(self.norm(self.fc1(x))))
        return self.head(functional.relu(self.fc2(hidden), inplace=True))


def _cnn(norm: str) -> nn.Module:
    task: Any = SimpleNamespace(name="images", input_shape=(1, 8, 8), outputs=3, inputs="real")
    return CNNConfig(channels=[4, 6], blocks=1, norm=norm, groups=2).build(task, torch.Generator().manual_seed(0))


def _transformer(depth: int = 1, dropout: float = 0.2) -> nn.Module:
    task: Any = SimpleNamespace(name="text", input_shape=(6,), outputs=5, inputs="tokens")
    return TransformerConfig(width=8, depth=depth, heads=2, dropout=dropout).build(task, torch.Generator().manual_seed(0))


HOSTS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: Net(),
    "dropout": lambda: Net(dropout=0.5),
    "batch_norm": lambda: Net(dropout=0.3, norm=True),
    "cnn_group": lambda: _cnn("group"),
    "cnn_batch": lambda: _cnn("batch"),
    "transformer": _transformer,
    "decoder": lambda: _transformer(depth=3, dropout=0.0),
}


def build(host: str) -> nn.Module:
    """A host with weights that are the same every time."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return HOSTS[host]()


def batch(host: str = "mlp", number: int = 0, size: int = 12) -> Batch:
    """Batch ``number`` of the data that a host learns from."""
    draws = torch.Generator().manual_seed(1000 + number)
    if host in ("transformer", "decoder"):
        tokens = torch.randint(0, 5, (size, 7), generator=draws)
        return tokens[:, :-1], tokens[:, 1:]
    shape = (1, 8, 8) if host.startswith("cnn") else (6,)
    inputs = torch.randn(size, *shape, generator=draws)
    return inputs, (inputs.flatten(1)[:, :3] * 2.0).argmax(1)


def sample_loss(model: Callable[[Tensor], Tensor], data: Batch) -> Tensor:
    """Cross-entropy of every sample."""
    output = model(data[0])
    if output.dim() == 3:
        return functional.cross_entropy(output.transpose(1, 2), data[1], reduction="none").mean(1)
    return functional.cross_entropy(output, data[1], reduction="none")


class Notebook(NullPort):
    """A port that writes everything down, and gives the commands it was told to give."""

    def __init__(self, commands: dict[int, list[Any]] | None = None) -> None:
        self.script = commands or {}
        self.transitions: list[Transition] = []
        self.acks: dict[str, tuple[str, str]] = {}
        self.gates: list[GateResult] = []
        self.alerts: list[Alert] = []
        self.rows: list[tuple[int, str, Tensor]] = []
        self.reports: list[Report] = []
        self.values: list[tuple[int, dict[str, float]]] = []

    def emit(self, event: Message) -> None:
        match event:
            case Transition():
                self.transitions.append(event)
            case GateResult():
                self.gates.append(event)
            case Alert():
                self.alerts.append(event)
            case Report():
                self.reports.append(event)
            case Metrics():
                self.values.append((event.tick, event.values))

    def acknowledge(self, command_id: str, status: str, reason: str, tick: int) -> None:
        self.acks[command_id] = (status, reason)

    def telemetry(self, tick: int, site: str, rows: Tensor) -> None:
        self.rows.append((tick, site, rows.clone()))

    def commands(self, tick: int) -> list[Any]:
        return self.script.get(tick, [])

    def stages(self) -> list[tuple[str, str]]:
        """(source, target) of every transition, in order."""
        return [(Stage(event.source).name, Stage(event.target).name) for event in self.transitions]


def germinate(site: str = "fc1", seed: int = 0, id: str = "", **names: str) -> Germinate:
    """The command, with an id of its own."""
    return Germinate(id=id or f"germinate-{site}-{seed}", site=site, seed=seed, **names)


def set_stage(target: Stage, site: str = "fc1", seed: int = 0, id: str = "") -> SetStage:
    """The command, with an id of its own."""
    return SetStage(id=id or f"{target.name}-{site}-{seed}", select=Selector(site=site, seeds=[seed]), target=int(target))


@dataclass
class Loop:
    """A user's training loop: AdamW on a host whose seeds are attached."""

    host: str = "mlp"
    commands: dict[int, list[Any]] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    total: int = 400
    accumulate: int = 1
    seeds: bool = True
    lr: float = 0.01
    device: str = "cpu"

    def __post_init__(self) -> None:
        """Build host, optimizer and, unless ``seeds`` is False, what grows."""
        self.model = build(self.host).to(self.device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), self.lr, weight_decay=0.1)
        self.port = Notebook(self.commands)
        self.step_number = 0
        self._grow: Grow | None = None
        torch.manual_seed(99)
        if self.seeds:
            given = {
                "lifecycle": short(),
                "per_site": 2,
                "telemetry": TelemetryConfig(every=10),
                "grafting": "linear",
                "judge": [self.batch(900, 64)],
            } | self.settings
            self._grow = attach(
                self.model,
                loss=sample_loss,
                total_steps=self.total,
                optimizer=self.optimizer,
                port=self.port,
                accumulate=self.accumulate,
                **given,
            )

    @property
    def grow(self) -> Grow:
        """The handle of what grows."""
        assert self._grow is not None
        return self._grow

    def batch(self, number: int, size: int = 12) -> Batch:
        """Batch ``number`` of the host's data, where the model is."""
        inputs, targets = batch(self.host, number, size)
        return inputs.to(self.device), targets.to(self.device)

    def backward(self, data: Batch | None = None) -> float:
        """One micro-batch: forward, backward, and the seeds' own learning."""
        data = self.batch(self.step_number) if data is None else data
        loss = sample_loss(self.model, data).mean()
        (loss / self.accumulate).backward()
        if self._grow is not None:
            self._grow.after_backward(data, loss.detach())
        return float(loss.detach())

    def step(self, *data: Batch) -> float:
        """One optimizer step over the given micro-batches (default: the next one) and the tick after it."""
        loss = sum(self.backward(one) for one in data) / len(data) if data else self.backward()
        self.optimizer.step()
        if self._grow is not None:
            self._grow.tick(loss)
        self.optimizer.zero_grad()
        self.step_number += 1
        return loss

    def run(self, steps: int) -> Loop:
        """Several steps."""
        for _ in range(steps):
            self.step()
        return self

    def until(self, stage: Stage, most: int = 100) -> Branch:
        """Steps until the first branch is in ``stage``."""
        for _ in range(most):
            if self.grow.registry.branches.entries and self.grow.registry.branches[0].stage is stage:
                return self.grow.registry.branches[0]
            self.step()
        raise AssertionError(f"no branch reached {stage.name}: {self.port.stages()}, {self.port.acks}")

    def host_state(self) -> dict[str, Tensor]:
        """Copies of the host's parameters and buffers."""
        return {name: value.detach().clone() for name, value in self.model.state_dict().items() if "seed_layer" not in name}

    def host_gradients(self) -> dict[str, Tensor]:
        """Copies of the host's gradients."""
        named = self.model.named_parameters()
        return {name: p.grad.clone() for name, p in named if p.grad is not None and "seed_layer" not in name}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    """Assert equal names and equal bits (NaN equals NaN)."""
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(torch.nan_to_num(first[name], 1e30), torch.nan_to_num(second[name], 1e30)), name
