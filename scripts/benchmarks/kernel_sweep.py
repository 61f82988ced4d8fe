"""`scripts/bench kernel_sweep`: times launch candidates on the GPU at hand; esper/kernels/launch_rules.py is read off its CSV."""

from __future__ import annotations

import argparse
import csv
import itertools
from pathlib import Path
from unittest import mock

import torch

from esper.kernels import launch_rules
from esper.kernels.launch_rules import InactiveChunksLaunch, Launch, WholeRowsLaunch
from scripts.benchmarks.kernels import NEAR_ZERO, ROWS, SHAPES, WIDTH, machine, make_problem, timed


def chunk_candidates(seeds: int, hidden: int, backward: bool) -> list[Launch]:
    """Row blocks × warps × stages × resident programs; backward at 128 by halves of the hidden units."""
    limit, found = launch_rules.limits(torch.device("cuda")), []
    blocks = ((64, 4), (64, 8), (32, 4), (128, 8), (128, 4)) if backward else ((64, 4), (128, 8), (128, 4), (64, 8))
    for (rows, warps), stages, resident in itertools.product(blocks, (2, 3), (1, 2, 3, 4)):
        if warps * resident <= 16 and not (backward and hidden > 64 and rows * 4 < warps * 64):
            parts = 2 if backward and hidden > 64 else 1
            found.append(Launch(rows, hidden // parts, warps, stages, launch_rules.programs(seeds, resident, limit) // parts))
    return found


def inactive_chunks_candidates(seeds: int) -> list[InactiveChunksLaunch]:
    """Rows × width of a tile × stages × resident programs of the copying kernel."""
    limit, place, found = launch_rules.limits(torch.device("cuda")), WIDTH // seeds, []
    for rows, wide, stages, resident in itertools.product((8, 16, 32), (128, 256, 512), (1, 3), (2, 4, 6, 8)):
        group = max(1, wide // place)
        if 2048 <= rows * wide <= 8192:
            found.append(
                InactiveChunksLaunch(rows, group, place, stages, launch_rules.row_parts(seeds // group, ROWS, rows, resident, limit))
            )
    return found


def row_candidates() -> list[tuple[int, int, int]]:
    """Warps, stages and programs a multiprocessor of the whole-row telemetry kernel."""
    return list(itertools.product((4, 8), (1, 3, 5), (2, 3, 4, 6)))


def main(argv: list[str]) -> int:
    """Time every candidate of every kernel at the three table shapes."""
    parser = argparse.ArgumentParser(prog="scripts/bench kernel_sweep", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("outputs/bench/kernel_sweep.csv"))
    parser.add_argument("--kind", default="mlp_relu")
    parser.add_argument("--only", default="telemetry,copying,inactive_chunks,forward,backward,input_gradient")
    options = parser.parse_args(argv)
    about, rows = machine(), []
    for what in options.only.split(","):
        for seeds, hidden in SHAPES:
            best = []
            for setting, time in sweep(what, seeds, hidden, options.kind):
                rows.append({"kernel": what, "seeds": seeds, "hidden": hidden, "setting": str(setting), "p50_ms": time, **about})
                best.append((time, str(setting)))
            for time, setting in sorted(best)[:6]:
                print(f"{what:10s} S={seeds} H={hidden} {time:8.4f} ms {setting}", flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return 0


def sweep(what: str, seeds: int, hidden: int, kind: str):
    """Yields (setting, p50 in ms); a setting that does not fit the device is infinitely slow.

    ``copying``: whole rows measured and copied, a tenth active; ``inactive_chunks``: the same without telemetry, in tiles of chunks.
    """
    from triton.runtime.errors import OutOfResources

    from esper.kernels.branches import branches, branches_backward
    from esper.kernels.telemetry import telemetry

    p = make_problem(ROWS, WIDTH, seeds, hidden, 0.1 if what in ("copying", "inactive_chunks") else 1.0, kind)
    x, dy = p.x[None], p.dy[None]

    def forward():
        return branches(x, p.alpha, p.route, None, kind, p.parameters, what != "inactive_chunks", NEAR_ZERO)

    def backward():
        return branches_backward(x, dy, p.alpha, None, p.route, kind, p.parameters)

    steps = {"telemetry": lambda: telemetry(p.x, seeds, NEAR_ZERO), "backward": backward, "input_gradient": backward}
    rule = "whole_rows" if what in ("telemetry", "copying") else what
    for launch in candidates(what, seeds, hidden):
        with mock.patch.object(launch_rules, rule, lambda *_, launch=launch: launch):
            yield launch, attempt(steps.get(what, forward), OutOfResources)


def candidates(what: str, seeds: int, hidden: int) -> list[Launch] | list[InactiveChunksLaunch] | list[WholeRowsLaunch]:
    """What the rule of that kernel may choose from; nothing where the rule is not asked."""
    limit = launch_rules.limits(torch.device("cuda"))
    if what in ("telemetry", "copying"):
        settings = row_candidates()
        return [WholeRowsLaunch(1, seeds, WIDTH // seeds, warps, limit.processors * held, stages) for warps, stages, held in settings]
    if what == "inactive_chunks":
        return inactive_chunks_candidates(seeds)
    if what == "input_gradient":
        blocks = ((128, 8), (64, 4)) if hidden > 64 else ()
        found = itertools.product(blocks, (1, 2), (1, 2))
        return [Launch(rows, hidden, warps, stages, launch_rules.programs(seeds, held, limit)) for (rows, warps), stages, held in found]
    return chunk_candidates(seeds, hidden, what == "backward")


def attempt(step, refused: type[Exception]) -> float:
    """Median time of a step, infinite where the device refuses its size."""
    try:
        return timed(step, 8)[1]
    except refused:
        return float("inf")
