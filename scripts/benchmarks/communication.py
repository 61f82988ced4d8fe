"""`scripts/bench communication`: what two processes of one training tell each other for telemetry and control, at 1,000 seeds × 12 sites.

Two processes under DistributedDataParallel over gloo train a host of 12 layers that carry 1,000 seeds each; some germinate, learn and are
blended in. Counted and timed is everything that the engine exchanges beside gradients: telemetry, losses and scores, commands, the
comparison at the end of a step, and the checksums for it. Each exchange begins when both processes have come to it, so that waiting for
the slower one is not in its time. Written are the exchanges, bytes and milliseconds of a step by case, the mean over a period of telemetry,
and its share of the bare host's step here and of the decoder's on a GPU (`docs/bench/step_decoder.csv`). The exit code is 1 beyond 1 % of
either.
"""

from __future__ import annotations

import argparse
import csv
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from esper.distributed import Ranks
from esper.distributed.ranks import INLINE
from esper.engine.agreement import Agreement
from esper.engine.attach import attach
from esper.engine.port import NullPort
from esper.lifecycle import LifecycleConfig, Stage
from esper.messages import Germinate
from esper.seeds import TelemetryConfig
from scripts.benchmarks._machine import machine

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "bench"
LIMIT = 0.01
SITES, SEEDS, WIDTH, GROWN = 12, 1000, 1024, 8
ROWS = 64
"""Samples of a batch: on a CPU any more make the step, and so the share here, only more favourable."""


class Net(nn.Module):
    """12 residual layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(SITES))

    def forward(self, x: Tensor) -> Tensor:
        """``[rows, 1024]`` → the same shape."""
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x


class Port(NullPort):
    """Lets the first seeds of every site germinate at a tick."""

    def __init__(self, tick: int) -> None:
        self.tick, self.decided = tick, True

    def commands(self, tick: int) -> list[Any]:
        """Once."""
        places = [(f"layers.{site}", seed) for site in range(SITES) for seed in range(GROWN)] if tick == self.tick else []
        return [Germinate(id=f"{site}/{seed}", site=site, seed=seed, blueprint="affine") for site, seed in places]


class Watch:
    """Counts and times the exchanges of the present step."""

    def __init__(self) -> None:
        self.exchanges = self.bytes = 0
        self.seconds = self.cpu = 0.0
        gather, state = Ranks.gather, Agreement._state

        def watched(ranks: Ranks, label: str, value: Any, tensor: Tensor | None = None) -> Any:
            dist.barrier(ranks.group)
            with self._timing():
                found = gather(ranks, label, value, tensor)
            length = max(16 + len(json.dumps(told)) + 8 * more.numel() for told, more in found)
            self.exchanges += 1 + (length > INLINE)
            self.bytes += 16 + INLINE + (length if length > INLINE else 0)
            return found

        def checked(agreement: Agreement, tick: int, thorough: bool) -> Any:
            with self._timing():
                return state(agreement, tick, thorough)

        Ranks.gather, Agreement._state = watched, checked  # type: ignore[method-assign]

    @contextmanager
    def _timing(self) -> Iterator[None]:
        began, used = time.perf_counter(), time.process_time()
        yield
        self.seconds += time.perf_counter() - began
        self.cpu += time.process_time() - used

    def take(self) -> tuple[int, int, float, float]:
        """(exchanges, bytes sent by a process to each other, milliseconds, those of them on the CPU) since the last call."""
        found = self.exchanges, self.bytes, 1e3 * self.seconds, 1e3 * self.cpu
        self.exchanges = self.bytes = 0
        self.seconds = self.cpu = 0.0
        return found


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).square().mean(1)


def _rank(rank: int, meeting: str, steps: int, every: int, results: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = DistributedDataParallel(Net())
    optimizer = torch.optim.SGD(model.parameters(), 1e-6)
    batch = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(rank))
    bare = [_step(model, optimizer, batch, None) for _ in range(5)][1:]
    watch, third = Watch(), steps // 3
    ages = {"training_min": third, "training_max": 2 * third, "grafting_max": 2 * steps, "germinated_max": 9}
    durations = {name: f"{age}step" for name, age in ages.items()}
    grow = attach(
        model,
        loss=loss,
        total_steps=10 * steps,
        sites="layers.*",
        per_site=SEEDS,
        sample=batch,
        grafting="linear",
        lifecycle=LifecycleConfig(**durations, readiness=-1.0, training_slots=SITES * GROWN, guard=False),
        telemetry=TelemetryConfig(every=every),
        port=Port(third),
    )
    watch.take()
    rows: dict[str, list[tuple[int, int, float, float]]] = defaultdict(list)
    for _ in range(steps):
        training, grafting = bool(grow.registry.in_stage(Stage.TRAINING)), bool(grow.registry.in_stage(Stage.GRAFTING))
        due = grow.observer.due
        _step(model, optimizer, batch, grow)
        case = "training" if training else "grafting" if grafting else "dormant"
        rows[f"{case}, telemetry" if due else case].append(watch.take())
    results.put((rank, dict(rows), statistics.median(bare)))
    dist.barrier()
    dist.destroy_process_group()


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Tensor, grow: Any) -> float:
    """One step; its milliseconds."""
    began = time.perf_counter()
    value = loss(model, batch).mean()
    value.backward()
    if grow is not None:
        grow.after_backward(batch, value.detach())
    optimizer.step()
    if grow is not None:
        grow.tick(value.detach())
    optimizer.zero_grad()
    return 1e3 * (time.perf_counter() - began)


def main(arguments: list[str]) -> int:
    """Measure, write, compare with the limit."""
    parser = argparse.ArgumentParser(prog="scripts/bench communication", description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--every", type=int, default=TelemetryConfig().every, help="ticks between two of telemetry")
    parser.add_argument("--output", type=Path, default=RESULTS / "communication.csv")
    options = parser.parse_args(arguments)
    with (RESULTS / "step_decoder.csv").open(encoding="utf-8") as file:
        decoder = float(next(csv.DictReader(file))["bare_ms"])
    rows, bare = _measured(options.steps, options.every)
    table = [_row(case, rows[case], bare, decoder) for case in rows]
    for case in ("dormant", "training", "grafting"):
        often, seldom = (_typical(rows[name]) for name in (case, f"{case}, telemetry"))
        mean = [((options.every - 1) * usual + one) / options.every for usual, one in zip(often, seldom, strict=True)]
        table.append(_row(f"{case}, a step on average", [mean], bare, decoder))
    place = {"every": options.every, **{name: value for name, value in machine().items() if name != "threads"}}
    with options.output.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [*table[0], *place], lineterminator="\n")
        writer.writeheader()
        writer.writerows(row | place for row in table)
    for row in table:
        print(", ".join(f"{name} {value}" for name, value in row.items()))
    missed = [row for row in table if "average" in str(row["case"]) and max(float(row["share_here"]), float(row["share_decoder"])) > LIMIT]
    return int(bool(missed))


def _typical(values: list[Any]) -> list[float]:
    """Mean counts and median times."""
    parts = list(zip(*values, strict=True))
    return [statistics.fmean(parts[0]), statistics.fmean(parts[1]), statistics.median(parts[2]), statistics.median(parts[3])]


def _row(case: str, values: list[Any], bare: float, decoder: float) -> dict[str, Any]:
    times = sorted(value[2] for value in values)
    middle = statistics.median(times)
    spread = {f"p{share}_ms": round(times[int(share / 100 * (len(times) - 1))], 3) for share in (20, 80)}
    return {
        "case": case,
        "exchanges": round(statistics.fmean(value[0] for value in values), 2),
        "bytes": round(statistics.fmean(value[1] for value in values)),
        "p50_ms": round(middle, 3),
        **spread,
        "cpu_ms": round(statistics.median(value[3] for value in values), 3),
        "bare_ms": round(bare, 2),
        "share_here": round(middle / bare, 5),
        "decoder_ms": round(decoder, 2),
        "share_decoder": round(middle / decoder, 5),
    }


def _measured(steps: int, every: int) -> tuple[dict[str, list[Any]], float]:
    """Rank 0's rows by case, and its bare step."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        given = (str(Path(folder) / "meeting"), steps, every, results)
        started = [context.Process(target=_rank, args=(rank, *given)) for rank in range(2)]
        for process in started:
            process.start()
        found = {rank: (rows, bare) for rank, rows, bare in (results.get(timeout=1800) for _ in started)}
        for process in started:
            process.join()
    return found[0]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
