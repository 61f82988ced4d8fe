"""`scripts/bench million`: one million seeds in one model: what a control tick takes, and the memory of a seed.

Everything at a tick boundary is real; only the host is missing, since no forward of a million features is what is asked about.
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from esper.blueprints import BLUEPRINTS
from esper.engine.attach import attach
from esper.engine.grow import Grow
from esper.grafting import CONFIGS as STRATEGIES
from esper.lifecycle import LifecycleConfig
from esper.seeds import TelemetryConfig
from scripts.benchmarks.step import STEPS, Germinate, Script

WIDTH, LAYERS = 16384, 64
TICK_LIMIT_MS, BYTES_LIMIT = 10.0, 64


@dataclass
class Row:
    """One line: ms of a control tick, and bytes a seed, at rest or with some branches GRAFTING and a command a tick."""

    case: str
    seeds: int
    p20_ms: float
    p50_ms: float
    p80_ms: float
    limit_ms: float
    bytes_per_seed: float
    load: float
    torch: str
    python: str
    system: str


class Wide(nn.Module):
    """Elementwise layers of ``WIDTH`` features, whose parameters are small beside their seeds."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Scale() for _ in range(LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        """``[N, WIDTH]`` to the same."""
        for layer in self.layers:
            x = layer(x)
        return x


class Scale(nn.Module):
    """One learnt factor."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        """The same shape."""
        return x * self.factor


def build(seeds: int, every: int) -> Grow:
    """A model with ``seeds`` seeds, nothing germinated."""
    lifecycle = LifecycleConfig(
        training_slots=10**6, training_min="1step", readiness=-1.0, training_max="95%", grafting_max="100%", stabilization_min="1step",
        fine_tuning_min="1step", evaluating_min="1step",
    )  # fmt: skip
    return attach(
        Wide(), loss=lambda model, batch: model(batch).square().mean(1), total_steps=STEPS, sites=["layers.*"], per_site=seeds // LAYERS,
        sample=torch.ones(1, WIDTH), blueprint=BLUEPRINTS["mlp"](receptive_field="chunk"), grafting=STRATEGIES["linear"](ramp="95%"),
        lifecycle=lifecycle, telemetry=TelemetryConfig(every=every), port=Script([]), count_macs=False,
    )  # fmt: skip


class Busy(Script):
    """Germinates ``count`` seeds at once, and later one more at every tick."""

    def __init__(self, count: int, seeds: int) -> None:
        chosen = [number * seeds // count for number in range(count)]
        super().__init__([self.command(row) for row in chosen])
        self.next = 1

    @staticmethod
    def command(row: int) -> Germinate:
        """Germinate the seed of this row."""
        return Germinate(id=str(row), site=f"layers.{row % LAYERS}", seed=row // LAYERS)

    def commands(self, tick: int) -> list[Any]:
        """The waiting ones, then one a tick."""
        if self.waiting:
            return super().commands(tick)
        self.next += 1
        return [self.command(self.next)]

    def acknowledge(self, command_id: str, status: str, reason: str, tick: int) -> None:
        """A seed may be taken already."""


def state_bytes(grow: Grow) -> float:
    """Bytes a seed of everything that has one entry a seed: the table and the last telemetry."""
    observer = grow.observer
    held = sum(rows.numel() * rows.element_size() for rows in observer.health)
    return grow.registry.table.bytes_per_seed + held / grow.registry.table.rows


def measure(case: str, grow: Grow, ticks: int) -> Row:
    """Time ``tick`` with no forward between: the boundary's own work."""
    for _ in range(8):
        grow.tick(1.0)
    times = []
    for _ in range(ticks):
        began = time.perf_counter()
        grow.tick(1.0)
        times.append(1e3 * (time.perf_counter() - began))
    p20, _, _, p80 = statistics.quantiles(times, n=5)
    return Row(
        case, grow.registry.table.rows, round(p20, 3), round(statistics.median(times), 3), round(p80, 3), TICK_LIMIT_MS,
        round(state_bytes(grow), 1), round(os.getloadavg()[0], 1), torch.__version__, platform.python_version(),
        f"{platform.system()} {platform.machine()}",
    )  # fmt: skip


def main(argv: list[str]) -> int:
    """Print the table and write the CSV; 1 when a limit is missed."""
    parser = argparse.ArgumentParser(prog="scripts/bench million", description=__doc__)
    parser.add_argument("--seeds", type=int, default=WIDTH * LAYERS, help=f"a multiple of {LAYERS}, at most {WIDTH * LAYERS}")
    parser.add_argument("--ticks", type=int, default=100)
    parser.add_argument("--out", type=Path, default=Path("outputs/bench/million.csv"), help="where the CSV goes")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows = [measure("all dormant", build(options.seeds, 10**6), options.ticks)]
    busy = build(options.seeds, 10**6)
    busy.port = busy.boundary.port = busy.transitions.port = busy.gates.port = Busy(16, options.seeds)
    rows.append(measure("16 and more grafting, a command a tick", busy, options.ticks))
    for row in rows:
        met = "met" if row.p50_ms <= row.limit_ms and row.bytes_per_seed <= BYTES_LIMIT else "MISSED"
        print(
            f"{row.case:40} {row.seeds:,} seeds: {row.p50_ms:.3f} ms ({row.p20_ms:.3f} to {row.p80_ms:.3f}; limit {row.limit_ms:.0f}), "
            f"{row.bytes_per_seed:.0f} bytes a seed (limit {BYTES_LIMIT})  {met}"
        )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(asdict(rows[0])))
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    return int(any(row.p50_ms > row.limit_ms or row.bytes_per_seed > BYTES_LIMIT for row in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
