"""`scripts/bench kernels`: the seed kernels against copying, torch and the limit, on one GPU. Prints a table and writes CSV.

Correctness comes first: no number is printed when a kernel differs from the float64 reference or from its own second run.
"""

from __future__ import annotations

import argparse
import csv
import platform
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from esper.errors import UserError

ROWS, WIDTH, NEAR_ZERO = 65536, 4096, 1e-3
SHAPES = ((64, 64), (128, 32), (32, 128))  # seeds, chunk = hidden
TARGETS = {  # issue limits, as ratios to a copy of the activations, in the order of SHAPES
    "dormant": (0.60, 0.60, 0.60),
    "forward 10%": (1.15, 1.15, 1.15),
    "forward": (1.4, 1.4, 1.6),
    "forward+backward": (4.0, 4.0, 5.0),
}


@dataclass
class Row:
    """One line of the table. Times in ms, rates from the bytes and operations that must at least be moved and done."""

    case: str
    kernel: str
    rows: int
    width: int
    seeds: int
    hidden: int
    p20_ms: float
    p50_ms: float
    p80_ms: float
    ratio: float
    target: float
    least_mb: float
    least_gflop: float
    gb_per_s: float
    floor_ms: float
    gap: float
    gpu: str
    torch: str
    triton: str
    python: str


@dataclass
class Problem:
    """A site in bfloat16 with an MLP bank of one slot a seed."""

    x: Tensor
    dy: Tensor
    alpha: Tensor
    route: Tensor
    kinds: str
    parameters: list[Tensor]

    @property
    def seeds(self) -> int:
        """Seeds of the site."""
        return self.alpha.shape[0]


def make_problem(rows: int, width: int, seeds: int, hidden: int, share: float, kinds: str, dtype=torch.bfloat16) -> Problem:
    """Random activations and branches; a ``share`` of the seeds, spread evenly, is active."""
    g = torch.Generator("cuda").manual_seed(rows + seeds)
    chunk = -(-width // seeds)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, device="cuda")

    x, dy = draw(rows, width).to(dtype), draw(rows, width).to(dtype)
    rank = torch.arange(seeds, device="cuda")
    active = (rank * share).floor() < ((rank + 1) * share).floor()
    route = torch.stack([torch.where(active, 0, -1), rank, torch.zeros_like(rank)], 1).int()
    # Weights that bfloat16 holds exactly, so that the gate compares arithmetic and not the rounding of its inputs.
    into, out = draw(seeds, chunk, hidden) / chunk**0.5, draw(seeds, hidden, chunk) / hidden**0.5
    parameters = [into.bfloat16().float(), draw(seeds, hidden), out.bfloat16().float(), draw(seeds, chunk)]
    return Problem(x, dy, active * 0.5, route, kinds, parameters)


def timed(step: Callable[[], object], repeats: int = 40) -> tuple[float, float, float]:
    """p20, p50, p80 in ms of one replay of a captured graph, so that launches from Python do not count."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for _ in range(5):
        graph.replay()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start, end in events:
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    times = torch.tensor([start.elapsed_time(end) for start, end in events], dtype=torch.float64)
    del graph
    return tuple(times.quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist())


def relative(out: Tensor, expected: Tensor) -> float:
    """‖out − expected‖ / ‖expected‖; infinite if anything is not finite."""
    value = float((out.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30))
    return value if value == value else float("inf")


def gate(kinds: str, shapes=SHAPES) -> list[str]:
    """What is wrong: kernels against the float64 reference (≤ 2e-2 relative RMS in bfloat16, 1e-4 telemetry) and their own second run."""
    from esper.kernels import reference, reference_branches
    from esper.kernels.branches import branches, branches_backward
    from esper.kernels.telemetry import telemetry

    wrong = []
    for seeds, hidden in shapes:
        for share in (0.1, 0.5, 1.0):
            p = make_problem(1777, WIDTH, seeds, hidden, share, kinds)
            x, dy = p.x[None], p.dy[None]

            def run(p=p, x=x, dy=dy):
                y, live, power, health = branches(x, p.alpha, p.route, None, p.kinds, p.parameters, True, NEAR_ZERO)
                dx, grads, _ = branches_backward(x, dy, live, None, p.route, p.kinds, p.parameters)
                return [y[0], health, telemetry(x, p.seeds, NEAR_ZERO), dx[0], *grads, power]

            found, again = run(), run()
            wide = [t.double() for t in p.parameters]
            y, live, power = reference_branches.forward(p.x.double(), p.alpha, p.route, p.kinds, wide)
            dx, grads, _ = reference_branches.backward(p.x.double(), p.dy.double(), live, None, p.route, p.kinds, wide)
            health = reference.telemetry(p.x.double(), p.seeds, NEAR_ZERO)
            names = ["y", "health", "telemetry", "dx", *[f"gradient {i}" for i in range(len(grads))], "power"]
            for name, a, b, e in zip(names, found, again, [y, health, health, dx, *grads, power], strict=True):
                far = relative(a, e)
                if not far <= (1e-4 if name in ("health", "telemetry") else 2e-2):
                    wrong.append(f"{name} is {far:.2e} from the reference (S={seeds}, H={hidden}, {share:.0%} active)")
                if not torch.equal(a, b):
                    wrong.append(f"{name} differs between two runs (S={seeds}, H={hidden}, {share:.0%} active)")
    return wrong


def cases(seeds: int, hidden: int, kinds: str, rivals: bool) -> dict[tuple[str, str], tuple[Callable[[], object], float, float]]:
    """(case, kernel) → step, least bytes, least operations."""
    from esper.kernels.branches import branches
    from esper.kernels.reference import telemetry as torch_telemetry
    from esper.kernels.reference_branches import ReferenceBranches
    from esper.kernels.telemetry import telemetry

    full, some = (make_problem(ROWS, WIDTH, seeds, hidden, share, kinds) for share in (1.0, 0.1))
    size, products = full.x.numel() * 2.0, 2.0 * full.x.numel() * hidden * 2

    def forward(p: Problem):
        return branches(p.x[None], p.alpha, p.route, None, p.kinds, p.parameters, True, NEAR_ZERO)

    def reference(p: Problem):
        return *ReferenceBranches.apply(p.x, p.alpha, p.route, None, p.kinds, *p.parameters), torch_telemetry(p.x, seeds, NEAR_ZERO)

    def both(step: Callable[[Problem], tuple]):
        p = Problem(
            full.x.detach().requires_grad_(), full.dy, full.alpha, full.route, kinds, [t.clone().requires_grad_() for t in full.parameters]
        )

        def run():
            y = step(p)[0]
            return torch.autograd.grad(y, [p.x, *p.parameters], p.dy.view_as(y))

        return run

    found = {
        ("dormant", "triton"): (lambda: telemetry(full.x, seeds, NEAR_ZERO), size, 0.0),
        ("forward 10%", "triton"): (lambda: forward(some), 2 * size, products / 10),
        ("forward", "triton"): (lambda: forward(full), 2 * size, products),
        ("forward+backward", "triton"): (both(forward), 5 * size, 3.5 * products),
    }
    if rivals:
        compiled = torch.compile(reference, fullgraph=True, dynamic=False)
        found[("dormant", "torch eager")] = (lambda: torch_telemetry(full.x, seeds, NEAR_ZERO), size, 0.0)
        found[("forward", "torch eager")] = (lambda: reference(full), 2 * size, products)
        found[("forward", "torch.compile")] = (lambda: compiled(full), 2 * size, products)
        found[("forward+backward", "torch eager")] = (both(reference), 5 * size, 3.5 * products)
        found[("x*w, earlier system", "triton")] = (earlier_system(full), 2 * size, 0.0)
    return found


def earlier_system(p: Problem) -> Callable[[], object]:
    """What the earlier system's kernel did: ``x·w`` where active, one program a row and seed."""
    import triton

    from scripts.benchmarks.earlier_kernel import scale_kernel

    rows, width = p.x.shape
    weight, y = torch.randn(width, device="cuda"), torch.empty_like(p.x)
    chunk = width // p.seeds
    return lambda: scale_kernel[(rows, p.seeds)](p.x, y, weight, p.alpha, width, CHUNK=chunk, BLOCK=triton.next_power_of_2(chunk))


def machine() -> dict[str, str]:
    """What the numbers were measured on."""
    import triton

    return {
        "gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__, "python": platform.python_version(),
    }  # fmt: skip


def small_case(kinds: str, about: dict[str, str], ceilings: tuple[float, float]) -> Row:
    """Forward of 4,096 × 1,024 with 16 seeds of 64, all active, telemetry due: at most 0.020 ms."""
    from esper.kernels.branches import branches

    p = make_problem(4096, 1024, 16, 64, 1.0, kinds)
    times = timed(lambda: branches(p.x[None], p.alpha, p.route, None, p.kinds, p.parameters, True, NEAR_ZERO))
    y = torch.empty_like(p.x)
    copy = copy_time(p.x, y)
    size = p.x.numel() * 2.0
    return make_row(
        ("small forward (≤ 0.020 ms)", "triton"), p, 64, times, copy, 0.020 / copy, 2 * size, p.x.numel() * 256.0, about, ceilings
    )


def make_row(key, p: Problem, hidden: int, times, copy: float, target: float, least: float, operations: float, about, ceilings) -> Row:
    """Join a measurement with its limit: ``ceilings`` are bytes/ms of the copy and operations/ms of a large product in this run."""
    floor = max(least / ceilings[0], operations / ceilings[1])
    rows, width = p.x.shape
    return Row(
        *key, rows, width, p.seeds, hidden, *(round(t, 5) for t in times), round(times[1] / copy, 3), round(target, 3),
        round(least / 1e6, 1),
        round(operations / 1e9, 1), round(least / times[1] / 1e6, 1), round(floor, 5), round(times[1] / floor, 2), **about,
    )  # fmt: skip


def copy_time(x: Tensor, y: Tensor, repeats: int = 40) -> float:
    """Median ms of ``y.copy_(x)`` launched as usual: a captured graph would use a slower copy node. The faster of both counts."""
    for _ in range(5):
        y.copy_(x)
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start, end in events:
        start.record()
        y.copy_(x)
        end.record()
    torch.cuda.synchronize()
    usual = torch.tensor([start.elapsed_time(end) for start, end in events]).median().item()
    return min(usual, timed(lambda: y.copy_(x))[1])


def ceilings() -> tuple[float, float, float]:
    """Copy time of the activations (ms), bytes/ms of that copy, operations/ms of an 8192³ bfloat16 product."""
    x = torch.randn(ROWS, WIDTH, device="cuda").bfloat16()
    y = torch.empty_like(x)
    copy = copy_time(x, y)
    a, b = (torch.randn(8192, 8192, device="cuda").bfloat16() for _ in range(2))
    return copy, 2.0 * 2 * x.numel() / copy, 2.0 * 8192**3 / timed(lambda: a @ b, 10)[1]


def measure(shapes, kinds: str, rivals: bool) -> list[Row]:
    """All rows of the table."""
    copy, bandwidth, rate = ceilings()
    about, rows = machine(), []
    for seeds, hidden in shapes:
        place = SHAPES.index((seeds, hidden))
        for key, (step, least, operations) in cases(seeds, hidden, kinds, rivals).items():
            target = TARGETS[key[0]][place] if key[1] == "triton" and key[0] in TARGETS else float("nan")
            p = make_problem(8, WIDTH, seeds, hidden, 1.0, kinds)
            p.x = p.x.new_empty(ROWS, WIDTH, device="meta")
            rows.append(make_row(key, p, hidden, timed(step), copy, target, least, operations, about, (bandwidth, rate)))
            print(line(rows[-1]), flush=True)
        torch.cuda.empty_cache()
    rows.append(small_case(kinds, about, (bandwidth, rate)))
    print(line(rows[-1]), flush=True)
    return rows


def line(row: Row) -> str:
    """One printed line."""
    met = "" if row.target != row.target else f"target {row.target:5.2f} {'met' if row.ratio <= row.target else 'MISSED'}"
    return (
        f"{row.case:28s}{row.kernel:15s} S={row.seeds:<4d}H={row.hidden:<4d} {row.p50_ms:8.4f} ms  ratio {row.ratio:6.2f}  "
        f"{row.gb_per_s:7.0f} GB/s  at least {row.least_mb:7.1f} MB and {row.least_gflop:6.1f} Gflop, gap {row.gap:5.2f}  {met}"
    )


def write(rows: list[Row], path: Path) -> None:
    """CSV with one column a field of :class:`Row`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(asdict(rows[0])))
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def main(argv: list[str]) -> int:
    """Run the gate, then the benchmark; 1 when the gate is red."""
    parser = argparse.ArgumentParser(prog="scripts/bench kernels", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("outputs/bench/kernels.csv"), help="where the CSV goes")
    parser.add_argument("--kind", default="mlp_relu", help="branch: mlp_relu, mlp_gelu or mlp_silu")
    parser.add_argument("--no-rivals", action="store_true", help="leave torch and the earlier kernel out")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        raise UserError("scripts/bench kernels measures GPU kernels and found no CUDA device; run it on a machine with one.")
    wrong = gate(options.kind)
    if wrong:
        print("correctness gate is RED, nothing measured:", *wrong, sep="\n  ")
        return 1
    print("correctness gate is green", machine())
    write(measure(SHAPES, options.kind, not options.no_rivals), options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
