"""`scripts/bench step`: what a training step costs with seeds, as ratios to the bare host in the same process.

Every arm is timed next to the bare host, block by block in turns (bare, arm, arm, bare, …), a block being one period of
telemetry; a ratio is the median over such pairs, so what else the machine does falls on both sides.
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from esper.blueprints import BLUEPRINTS
from esper.engine.attach import attach
from esper.engine.grow import Grow
from esper.engine.port import NullPort
from esper.errors import UserError
from esper.grafting import CONFIGS as STRATEGIES
from esper.hosts.config import CNNConfig
from esper.lifecycle import LifecycleConfig, Stage
from esper.messages import Germinate
from esper.seeds import TelemetryConfig
from esper.trainer.device import keep_freed_memory
from scripts.benchmarks._baseline import Spread, regressions
from scripts.benchmarks._machine import chosen

BASELINE = Path(__file__).resolve().parents[2] / "experiments" / "step_cost" / "results" / "cpu.csv"

STEPS = 10_000_000
"""Length the runs pretend to have, so that no seed leaves its stage while it is timed."""

LEARNING_RATE = 1e-7
"""So small that no batch is learnt by heart: moments of vanishing gradients are denormal numbers, and those are slow."""


@dataclass(frozen=True)
class Host:
    """What is trained: a model, a batch's shape, the sites and how many seeds share each."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    sites: tuple[str, ...]
    per_site: int


@dataclass(frozen=True)
class Arm:
    """One way of having seeds: ``share`` of them in ``stage``, ``every`` ticks a telemetry row."""

    name: str
    share: float = 0.0
    stage: Stage = Stage.DORMANT
    field: str = "chunk"
    every: int = TelemetryConfig.every
    limit: float = float("nan")


ARMS = (
    Arm("dormant", limit=1.05),
    Arm("dormant, telemetry every step", every=1),
    Arm("10 % grafting, chunk", 0.1, Stage.GRAFTING, limit=1.25),
    Arm("10 % grafting, layer", 0.1, Stage.GRAFTING, "layer"),
    Arm("all grafting, chunk", 1.0, Stage.GRAFTING),
    Arm("all grafting, layer", 1.0, Stage.GRAFTING, "layer"),
    Arm("10 % training (shadow), chunk", 0.1, Stage.TRAINING),
)


@dataclass
class Row:
    """One line of the table; times in ms a step, ratios to the bare host of the same pairs."""

    host: str
    arm: str
    p20_ms: float
    p50_ms: float
    p80_ms: float
    bare_ms: float
    ratio_p20: float
    ratio: float
    ratio_p80: float
    cpu_ratio: float
    limit: float
    pairs: int
    device: str
    threads: int
    load: float
    torch: str
    python: str
    system: str


class MLP(nn.Module):
    """784 – 1024 – 1024 – 10."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.head = nn.Linear(784, 1024), nn.Linear(1024, 1024), nn.Linear(1024, 10)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, 784] → [N, 10]``."""
        return self.head(functional.relu(self.fc2(functional.relu(self.fc1(x)))))


def _cnn() -> nn.Module:
    task: Any = SimpleNamespace(name="images", input_shape=(1, 28, 28), outputs=10, inputs="real")
    return CNNConfig(channels=[32, 64], blocks=1, stride=2).build(task, torch.Generator().manual_seed(0))


def _wide_cnn() -> nn.Module:
    task: Any = SimpleNamespace(name="images", input_shape=(3, 32, 32), outputs=10, inputs="real")
    return CNNConfig(channels=[64, 128], blocks=1, stride=2).build(task, torch.Generator().manual_seed(0))


def _small() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 10))


HOSTS = {
    "mlp": Host(MLP, (256, 784), ("fc1", "fc2"), 64),
    "cnn": Host(_cnn, (64, 1, 28, 28), ("stem", "stages.*.conv1", "stages.*.conv2"), 8),
    "wide cnn": Host(_wide_cnn, (64, 3, 32, 32), ("stem", "stages.*.conv1", "stages.*.conv2"), 8),
    "small": Host(_small, (64, 64), ("0", "2"), 4),
}


def sample_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Cross-entropy of every sample."""
    return functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


class Script(NullPort):
    """Germinates the wanted seeds at tick 1; counts the telemetry rows it is given."""

    def __init__(self, commands: list[Germinate]) -> None:
        self.waiting = commands
        self.rows = 0

    def telemetry(self, tick: int, site: str, rows: Tensor) -> None:
        """A port copies the rows."""
        self.rows += rows.clone().shape[0]

    def commands(self, tick: int) -> list[Any]:
        """Everything at the first tick."""
        given, self.waiting = self.waiting, []
        return given

    def acknowledge(self, command_id: str, status: str, reason: str, tick: int) -> None:
        """Nothing may be refused."""
        assert status == "applied", reason


class Loop:
    """A training loop on one fixed batch; with an ``arm``, the same loop with seeds attached."""

    def __init__(self, host: Host, arm: Arm | None, device: torch.device) -> None:
        torch.manual_seed(0)
        self.model = host.build().to(device)
        self.device = device
        self.optimizer = torch.optim.AdamW(self.model.parameters(), LEARNING_RATE)
        draws = torch.Generator().manual_seed(1)
        inputs = torch.randn(*host.shape, generator=draws)
        self.batch = inputs.to(device), torch.randint(0, 10, host.shape[:1], generator=draws).to(device)
        self.grow = None if arm is None else self._attach(host, arm)
        if self.grow is not None and arm is not None:
            self._reach(arm)

    def _attach(self, host: Host, arm: Arm) -> Grow:
        lifecycle = LifecycleConfig(
            training_slots=10**6, training_min="1step" if arm.stage is not Stage.TRAINING else "90%", readiness=-1.0,
            training_max="95%", grafting_max="100%", stabilization_min="1step", fine_tuning_min="1step", evaluating_min="1step",
        )  # fmt: skip
        ramp = "1step" if arm.stage is Stage.TRAINING else "95%"
        port = Script([])
        grow = attach(
            self.model, loss=sample_loss, total_steps=STEPS, optimizer=self.optimizer, sites=list(host.sites), per_site=host.per_site,
            sample=self.batch, blueprint=BLUEPRINTS["mlp"](receptive_field=arm.field), grafting=STRATEGIES["linear"](ramp=ramp),
            lifecycle=lifecycle, telemetry=TelemetryConfig(every=arm.every), port=port,
        )  # fmt: skip
        seeds = [(site.name, seed) for site in grow.registry.sites for seed in range(site.geometry.seeds)]
        wanted = round(arm.share * len(seeds))
        chosen = [seeds[number * len(seeds) // wanted] for number in range(wanted)]
        port.waiting = [Germinate(id=f"{site}-{seed}", site=site, seed=seed) for site, seed in chosen]
        return grow

    def _reach(self, arm: Arm) -> None:
        assert self.grow is not None
        stages = self.grow.registry.table.stage
        wanted = round(arm.share * len(stages))
        for _ in range(8):
            self.step()
        there = int((stages == int(arm.stage)).sum())
        assert there == (wanted or len(stages)), f"{there} seeds are {arm.stage.name}, not {wanted}"

    def step(self) -> None:
        """Forward, backward, optimizer; and the seeds' part of it."""
        loss = sample_loss(self.model, self.batch).mean()
        loss.backward()
        if self.grow is not None:
            self.grow.after_backward(self.batch, loss.detach())
        self.optimizer.step()
        if self.grow is not None:
            self.grow.tick(loss.detach())
        self.optimizer.zero_grad()

    def block(self, steps: int) -> tuple[float, float]:
        """(wall, CPU) seconds a step over ``steps`` steps."""
        began, busy = time.perf_counter(), time.process_time()
        for _ in range(steps):
            self.step()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - began) / steps, (time.process_time() - busy) / steps


def measure(name: str, arm: Arm, device: torch.device, pairs: int, steps: int) -> Row:
    """One row: ``pairs`` of blocks of ``steps`` steps, which of the two comes first in turns."""
    host = HOSTS[name]
    bare, seeded = Loop(host, None, device), Loop(host, arm, device)
    for loop in (bare, seeded):
        loop.block(steps)
    found: dict[Loop, list[tuple[float, float]]] = {bare: [], seeded: []}
    for number in range(pairs):
        for loop in (bare, seeded) if number % 2 == 0 else (seeded, bare):
            found[loop].append(loop.block(steps))
    times = [1e3 * wall for wall, _ in found[seeded]]
    ratios = [mine[0] / base[0] for mine, base in zip(found[seeded], found[bare], strict=True)]
    busy = [mine[1] / base[1] for mine, base in zip(found[seeded], found[bare], strict=True)]
    limit = arm.limit if device.type == "cpu" and name != "small" else float("nan")
    bare_ms = 1e3 * statistics.median(wall for wall, _ in found[bare])
    values = (*spread(times), bare_ms, *spread(ratios), statistics.median(busy))
    return Row(name, arm.name, *(round(value, 4) for value in values), limit, pairs, *about(device))


def spread(values: list[float]) -> tuple[float, float, float]:
    """p20, p50, p80."""
    p20, p50, p80 = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist()
    return p20, p50, p80


def about(device: torch.device) -> tuple[str, int, float, str, str, str]:
    """Device, threads, load, versions and system."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({os.cpu_count()} cores)"
    load = round(os.getloadavg()[0], 1)
    return gpu, torch.get_num_threads(), load, torch.__version__, platform.python_version(), f"{platform.system()} {platform.machine()}"


def line(row: Row) -> str:
    """One printed line."""
    met = "" if row.limit != row.limit else f"limit {row.limit:.2f} {'met' if row.ratio <= row.limit else 'MISSED'}"
    return (
        f"{row.host:9}{row.arm:32}{row.p50_ms:9.3f} ms ({row.p20_ms:.3f} to {row.p80_ms:.3f})  × {row.ratio:6.3f} bare "
        f"({row.ratio_p20:.3f} to {row.ratio_p80:.3f}; CPU time {row.cpu_ratio:.3f})  {met}"
    )


def write(rows: list[Any], path: Path) -> None:
    """CSV of rows that are dataclasses, with one column a field."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(asdict(rows[0])))
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def main(argv: list[str]) -> int:
    """Print the table and write the CSV; 1 when a limit is missed."""
    parser = argparse.ArgumentParser(prog="scripts/bench step", description=__doc__)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--hosts", default=",".join(HOSTS), help="of " + ", ".join(HOSTS) + "; or decoder (a GPU's)")
    parser.add_argument("--arms", nargs="+", default=[""], help="only arms whose name begins with one of these")
    parser.add_argument("--modes", nargs="+", default=["default"], help="of the compiled decoder: modes of torch.compile")
    parser.add_argument("--pairs", type=int, default=15, help="pairs of blocks for each arm")
    parser.add_argument("--steps", type=int, default=TelemetryConfig.every, help="steps of a block")
    parser.add_argument("--threads", type=int, default=1, help="of torch, on the CPU")
    parser.add_argument("--out", type=Path, default=Path("outputs/bench/step.csv"), help="where the CSV goes")
    parser.add_argument("--check", action="store_true", help="also fail where a ratio is worse than the baseline's, spread for spread")
    parser.add_argument("--baseline", type=Path, default=BASELINE, help="a CSV of this benchmark, from the same kind of device")
    options = parser.parse_args(argv)
    if options.hosts == "decoder":
        from scripts.benchmarks.decoder import run_decoder

        return run_decoder(chosen(options.device), options.pairs, options.out, options.arms, options.modes)
    baseline = read(options.baseline) if options.check else []
    unknown = [name for name in options.hosts.split(",") if name not in HOSTS]
    if unknown:
        raise UserError(f"There is no host '{unknown[0]}'; there are {', '.join(HOSTS)}.")
    keep_freed_memory()  # as a run does
    torch.set_num_threads(options.threads)
    device = chosen(options.device)
    rows = []
    for name in options.hosts.split(","):
        for arm in ARMS:
            if arm.name.startswith(tuple(options.arms)):
                rows.append(measure(name, arm, device, options.pairs, options.steps))
                print(line(rows[-1]), flush=True)
                write(rows, options.out)
    if not rows:
        asked = " or ".join(f"'{name}'" for name in options.arms)
        raise UserError(f"No arm's name begins with {asked}; they are {'; '.join(arm.name for arm in ARMS)}.")
    print(f"{rows[-1].device}, {rows[-1].threads} thread(s), torch {rows[-1].torch}, load {rows[-1].load}; written to {options.out}")
    worse = regressions(spreads([asdict(row) for row in rows]), spreads(baseline))
    for sentence in worse:
        print(f"worse than {options.baseline}: {sentence}")
    return int(bool(worse) or any(row.ratio > row.limit for row in rows))


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a CSV that this benchmark wrote. Raises UserError where there is none."""
    if not path.is_file():
        raise UserError(f"--baseline {path}: there is no such file.")
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def spreads(rows: list[dict[str, Any]]) -> dict[str, Spread]:
    """The ratios to the bare host by host and arm."""
    return {f"{row['host']}, {row['arm']}": Spread(float(row["ratio_p20"]), float(row["ratio_p80"])) for row in rows}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
