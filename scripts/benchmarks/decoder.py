"""`scripts/bench step --device cuda --host decoder`: the whole training step of a compiled decoder with seeds at its MLPs.

12 blocks of width 768, sequences of 1,024 tokens, 16 at once, 50,304 words, bfloat16 by autocast, fused AdamW, `torch.compile` in its
default mode or as captured graphs (`--modes reduce-overhead`). Seeds sit at the twelve hidden sites of width 3,072. Every row is timed
beside the same decoder without seeds, block by block in turns, as `scripts/bench step` does. Memory is the peak of a step of either, and
is not known of captured graphs, which keep theirs apart; a wait is whatever `torch.cuda.set_sync_debug_mode` calls one.
"""

from __future__ import annotations

import gc
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from esper import attach
from esper.blueprints import BLUEPRINTS
from esper.engine.costs import compiled_so_far
from esper.errors import UserError
from esper.grafting import CONFIGS as STRATEGIES
from esper.lifecycle import LifecycleConfig, Stage
from esper.seeds import TelemetryConfig
from scripts.benchmarks.step import Germinate, Script, about, spread, write

WIDTH, LENGTH, BATCH, DEPTH, WORDS, HEADS = 768, 1024, 16, 12, 50304, 12
PEAK = 989e12
"""Dense bfloat16 operations a second of an H100 or H200, by their datasheets."""


@dataclass(frozen=True)
class Case:
    """A row: ``share`` of ``per_site`` seeds a site in ``stage``; ``ratio`` and ``memory`` are the limits."""

    name: str
    per_site: int
    share: float = 0.0
    every: int = 16
    field: str = "chunk"
    stage: Stage = Stage.GRAFTING
    ratio: float = float("nan")
    memory: float = float("nan")


CASES = (
    Case("1,000 a site, all dormant", 1000, ratio=1.005),
    Case("1,000 a site, all dormant, telemetry every step", 1000, every=1, ratio=1.03),
    Case("1,000 a site, 10 % grafting, chunk", 1000, 0.1, ratio=1.10, memory=1.10),
    Case("64 a site, 10 % grafting, chunk", 64, 0.1, ratio=1.10),
    Case("64 a site, all grafting, chunk", 64, 1.0, ratio=1.30),
    Case("64 a site, 10 % grafting, layer", 64, 0.1, field="layer"),
    Case("64 a site, 10 % training (shadow), chunk", 64, 0.1, stage=Stage.TRAINING, ratio=1.7),
)


@dataclass
class DecoderRow:
    """One line of the table; times in ms a step, ratios to the bare decoder of the same pairs, memory in MiB."""

    case: str
    mode: str
    p20_ms: float
    p50_ms: float
    p80_ms: float
    bare_ms: float
    ratio_p20: float
    ratio: float
    ratio_p80: float
    limit: float
    peak_mib: float
    bare_peak_mib: float
    memory_ratio: float
    memory_limit: float
    graphs: int
    compile_s: float
    waits: float
    tokens_s: float
    bf16_share: float
    pairs: int
    device: str
    threads: int
    load: float
    torch: str
    python: str
    system: str


class Block(nn.Module):
    """Attention and an MLP, each behind a layer norm."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.qkv, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.between, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, T, WIDTH]`` → the same."""
        heads = self.qkv(self.before(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        seen = functional.scaled_dot_product_attention(*heads.unbind(0), is_causal=True)
        x = x + self.out(seen.transpose(1, 2).flatten(2))
        return x + self.down(functional.gelu(self.up(self.between(x))))


class Decoder(nn.Module):
    """``DEPTH`` blocks between an embedding and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))
        self.last, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WORDS, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """``[N, T] → [N, T, WORDS]``."""
        x = self.words(tokens) + self.places.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.last(x))


def decoder_loss(model: Callable[[Tensor], Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
    """Mean cross-entropy of the next token."""
    with torch.autocast("cuda", torch.bfloat16):
        output = model(batch[0])
    return functional.cross_entropy(output.float().flatten(0, 1), batch[1].flatten())


class DecoderLoop:
    """A training loop on one fixed batch; with a ``case``, the same loop with seeds attached."""

    def __init__(self, case: Case | None, mode: str = "default") -> None:
        self.mode = mode
        torch.manual_seed(0)
        self.model = Decoder().to("cuda")
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 1e-4, fused=True)
        draws = torch.Generator(device="cuda").manual_seed(1)
        tokens = torch.randint(0, WORDS, (BATCH, LENGTH + 1), generator=draws, device="cuda")
        self.batch = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        self.run: Any = torch.compile(self.model, mode=mode)
        self.port = Script([])
        self.grow = None if case is None else self._attach(case)

    def _attach(self, case: Case) -> Any:
        staying = case.stage is Stage.TRAINING
        lifecycle = LifecycleConfig(
            training_slots=10**6, training_min="90%" if staying else "1step", readiness=-1.0, training_max="95%", grafting_max="100%",
            stabilization_min="1step", fine_tuning_min="1step", evaluating_min="1step",
        )  # fmt: skip
        return attach(
            self.run, loss=decoder_loss, total_steps=10**7, optimizer=self.optimizer, sites=["blocks.*.up"], per_site=case.per_site,
            sample=(self.batch[0][:1], self.batch[1][:1]), blueprint=BLUEPRINTS["mlp"](receptive_field=case.field),
            grafting=STRATEGIES["linear"](ramp="1step" if staying else "95%"), lifecycle=lifecycle,
            telemetry=TelemetryConfig(every=case.every), port=self.port, count_macs=False,
        )  # fmt: skip

    def become(self, case: Case) -> None:
        """Ask for what is missing of the case's branches, and step until they are there."""
        assert self.grow is not None
        self.grow.observer.config.every = case.every
        registry = self.grow.registry
        seeds = [(site.name, seed) for site in registry.sites for seed in range(site.geometry.seeds)]
        wanted = round(case.share * len(seeds))
        chosen = [seeds[number * len(seeds) // wanted] for number in range(wanted)]
        there = {(registry.sites[branch.site].name, branch.seed) for branch in registry.branches.living()}
        self.port.waiting = [Germinate(id=f"{site}-{seed}", site=site, seed=seed) for site, seed in chosen if (site, seed) not in there]
        self.block(case.every * 2 if case.every > 1 else 8)
        found = int((registry.table.stage == int(case.stage)).sum())
        assert found == wanted, f"{found} seeds are {case.stage.name}, not {wanted}"

    def step(self) -> None:
        """Forward, backward, optimizer; and the seeds' part of it."""
        loss = decoder_loss(self.run, self.batch)
        loss.backward()
        if self.grow is not None:
            self.grow.after_backward(self.batch, loss.detach())
        self.optimizer.step()
        if self.grow is not None:
            self.grow.tick(loss.detach())
        self.optimizer.zero_grad(set_to_none=True)

    def block(self, steps: int = 16) -> float:
        """Seconds a step over ``steps`` steps."""
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(steps):
            self.step()
        torch.cuda.synchronize()
        return (time.perf_counter() - began) / steps

    def waits(self, steps: int = 16) -> float:
        """Waits for the device a step."""
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                for _ in range(steps):
                    self.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return sum("synchronizing" in str(warning.message) for warning in said) / steps

    def peak(self, steps: int = 16) -> float:
        """Bytes at the peak of a step, less what other loops hold; NaN of captured graphs."""
        if self.mode != "default":
            return float("nan")
        torch.cuda.synchronize()
        held = torch.cuda.memory_allocated() - self._own()
        torch.cuda.reset_peak_memory_stats()
        for _ in range(steps):
            self.step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - held

    def _own(self) -> int:
        tensors = [*self.model.parameters(), *self.batch]
        tensors += [value for state in self.optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
        if self.grow is not None:
            banks = [bank for number in range(len(self.grow.registry.sites)) for bank in self.grow.registry.banks(number).values()]
            tensors += [moment for bank in banks for pair in bank.moments.values() for moment in pair if isinstance(moment, Tensor)]
        return sum(tensor.nbytes for tensor in tensors if tensor.is_cuda)


def operations() -> float:
    """Floating-point operations of a bare step: six a weight and token, and the attention's two products."""
    weights = DEPTH * 12 * WIDTH * WIDTH + WORDS * WIDTH
    return 6.0 * weights * BATCH * LENGTH + DEPTH * 6.0 * BATCH * LENGTH * LENGTH * WIDTH


def measured(case: Case, bare: DecoderLoop, seeded: DecoderLoop, pairs: int) -> DecoderRow:
    """One row; both loops are warm afterwards."""
    bare.block(4)
    graphs, seconds = compiled_so_far()
    seeded.become(case)
    seeded.block()
    now = compiled_so_far()
    found: dict[DecoderLoop, list[float]] = {bare: [], seeded: []}
    for number in range(pairs):
        for loop in (bare, seeded) if number % 2 == 0 else (seeded, bare):
            found[loop].append(loop.block())
    times, ratios = [1e3 * wall for wall in found[seeded]], [a / b for a, b in zip(found[seeded], found[bare], strict=True)]
    peak, bare_peak, waits = seeded.peak(), bare.peak(), seeded.waits()
    bare_ms = 1e3 * statistics.median(found[bare])
    p50 = statistics.median(times) / 1e3
    numbers = [*spread(times), bare_ms, *spread(ratios), case.ratio, peak / 2**20, bare_peak / 2**20, peak / bare_peak, case.memory]
    rest = (now[0] - graphs, round(now[1] - seconds, 1), waits, round(BATCH * LENGTH / p50), round(operations() / p50 / PEAK, 3))
    return DecoderRow(case.name, seeded.mode, *(round(value, 4) for value in numbers), *rest, pairs, *about(torch.device("cuda")))


def decoder_line(row: DecoderRow) -> str:
    """One printed line."""
    met = "" if row.limit != row.limit else f" limit {row.limit:.3f} {'met' if row.ratio <= row.limit else 'MISSED'}"
    return (
        f"{row.case:48}{row.mode:16}{row.p50_ms:8.2f} ms × {row.ratio:.3f} bare ({row.ratio_p20:.3f} to {row.ratio_p80:.3f}){met}; "
        f"memory × {row.memory_ratio:.3f}; {row.graphs} graphs in {row.compile_s:.0f} s; {row.waits:.2f} waits a step; "
        f"{row.tokens_s:,} tokens/s; {row.bf16_share:.0%} of the bf16 peak"
    )


def run_decoder(device: torch.device, pairs: int, out: Path, only: list[str], modes: list[str]) -> int:
    """Print the table and write the CSV; 1 when a limit is missed. Every mode of ``torch.compile`` has a bare decoder of its own."""
    from torch._dynamo import config as dynamo_config

    if device.type != "cuda":
        raise UserError("--host decoder takes hours on a CPU; use --device cuda.")
    torch.set_float32_matmul_precision("high")
    dynamo_config.recompile_limit = 64  # graphs belong to code: all the models of this process share those of one
    rows: list[DecoderRow] = []
    for mode in modes:
        loops: dict[tuple[Any, ...], DecoderLoop] = {}
        bare = DecoderLoop(None, mode)
        for case in (case for case in CASES if case.name.startswith(tuple(only))):
            key = (case.per_site, case.field, case.stage)
            if key not in loops:
                loops.clear()
                gc.collect()
                loops[key] = DecoderLoop(case, mode)
            rows.append(measured(case, bare, loops[key], pairs))
            print(decoder_line(rows[-1]), flush=True)
            write(rows, out)
    print(f"{rows[-1].device}, torch {rows[-1].torch}; written to {out}")
    return int(any(row.ratio > row.limit or row.memory_ratio > row.memory_limit for row in rows))
