"""`scripts/bench kernel_resources`: compiles the kernels for 8.0, 8.9 and 9.0 without such a device, and writes what they need.

Registers, spilled bytes and shared memory beside the launch rule's estimate and the device's limit. Must not run interpreted.
"""

from __future__ import annotations

import argparse
import csv
import re
import subprocess
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from esper.kernels import chunk_backward, chunk_forward, launch_rules, telemetry_kernels
from esper.kernels.branch_kinds import KINDS, BranchKind
from esper.kernels.launch_rules import Launch, Limits

DEVICES = {80: Limits((8, 0), 108, 166_912), 89: Limits((8, 9), 34, 101_376, 65536, 1536), 90: Limits((9, 0), 132, 232_448)}
ITEMSIZE = {"bf16": 2, "fp16": 2, "fp32": 4}
ACTIVATIONS, INTEGERS = {"x", "y", "dy", "dx"}, {"route", "active_seeds", "rank", "unsound"}


DIRECTIONS = ("forward", "backward", "backward with objectives", "input gradient")
SITES = ("4096x64", "3072x1000", "8192x64")  # of the second the chunks are narrow
"""Width x seeds at which the whole-row telemetry kernel is compiled."""


def constants(kind: BranchKind, chunk: int, hidden: int, launch: Launch, direction: str, plain_stages: int) -> dict[str, object]:
    """Compile-time arguments of the kernel for a contiguous site of even chunks; ``plain_stages`` see the forward kernel."""
    padded = launch_rules.power_of_two(chunk, 16)
    common = {
        "C": chunk, "H": hidden, "CP": padded, "HB": launch.hidden, "BM": launch.rows, "EVEN": True, "FULL": chunk == padded, "FLAT": True,
        "BIAS": kind.bias, "GATED": kind.gated, "ACT": kind.activation, "PRECISION": "ieee", "xc": 1,
    }  # fmt: skip
    if direction == "forward":
        stages = {"STAGES": launch.stages, "PLAIN_STAGES": plain_stages}
        distances = dict.fromkeys(("XR", "YR"), 64 * chunk)
        return {**common, **stages, **distances, "AFFINE": kind.affine, "TELEMETRY": True, "WHOLE": True, "HALF": False, "yc": 1}
    common |= {"OBJECTIVES": "objectives" in direction, "gc": 1, "dc": 1} | dict.fromkeys(("XR", "GR", "DR"), 64 * chunk)
    return common if direction == "input gradient" else {**common, "AFFINE": kind.affine, "INPUT": launch.hidden >= hidden}


def signature(names: list[str], fixed: dict[str, object], dtype: str) -> dict[str, str]:
    """Triton's types of all arguments: activations, integer tables, scalars, and float32 tensors for the rest."""
    found = {}
    for name in names:
        scalar = name in ("seeds", "width", "rows", "parts", "inner") or (len(name) == 2 and name[1] in "oic" and name[0] in "xygd")
        pointer = dtype if name in ACTIVATIONS else "i32" if name in INTEGERS else "fp32"
        found[name] = "constexpr" if name in fixed else "i32" if scalar else "fp32" if name == "near_zero" else f"*{pointer}"
    return found


def compiled(kernel, fixed: dict[str, object], dtype: str, warps: int, capability: int, stages: int = 1):
    """The kernel for one compute capability, all pointers and strides divisible by 16 as PyTorch's are."""
    names = kernel.arg_names
    types = signature(names, fixed, dtype)
    aligned = [n for n in names if types[n].startswith("*") or n in ("xo", "xi", "yo", "yi", "go", "gi", "do", "di", "rows", "width")]
    attributes = {(names.index(n),): [["tt.divisibility", 16]] for n in aligned}
    source = ASTSource(kernel, types, {(names.index(n),): value for n, value in fixed.items()}, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps, "num_stages": stages})


def registers_and_spills(binary: bytes) -> tuple[int, int]:
    """Registers a thread and stack bytes, as cuobjdump (part of Triton's package) reads them off the binary."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        text = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found, text
    return int(found[1]), int(found[2])


def row(direction: str, name: str, chunk: int, hidden: int, dtype: str, capability: int) -> dict[str, object] | None:
    """Compile one kernel of the branches with its rule's settings and report; None where the rule does not launch it."""
    kind, limit, backward = KINDS[name], DEVICES[capability], direction != "forward"
    padded, units, objectives = launch_rules.power_of_two(chunk, 16), launch_rules.power_of_two(hidden, 16), "objectives" in direction
    widths = (padded, units, kind.gated, kind.affine, ITEMSIZE[dtype], 64, limit)
    launch, plain = (
        launch_rules.backward(*widths, objectives) if backward else launch_rules.forward(*widths),
        launch_rules.forward(*widths, False),
    )
    if direction == "input gradient" and launch.hidden >= units:
        return None
    sizes = (
        launch.rows,
        padded,
        launch.hidden,
        kind.gated,
        ITEMSIZE[dtype],
        launch.stages if backward else max(launch.stages, plain.stages),
    )
    bound = launch_rules.backward_shared(*sizes, units > launch.hidden, objectives) if backward else launch_rules.forward_shared(*sizes)
    if direction == "input gradient":
        launch = launch_rules.input_gradient(padded, units, kind.gated, ITEMSIZE[dtype], 64, limit, launch)
        sizes = (launch.rows, padded, launch.hidden, kind.gated, ITEMSIZE[dtype], launch.stages)
        bound = launch_rules.input_gradient_shared(*sizes, launch.hidden < units)
    kernel = {
        "forward": chunk_forward.chunk_forward_kernel,
        "input gradient": chunk_backward.chunk_input_gradient_kernel,
    }.get(direction, chunk_backward.chunk_backward_kernel)
    binary = compiled(
        kernel, constants(kind, chunk, hidden, launch, direction, plain.stages), dtype, launch.warps, capability, launch.stages
    )
    settings = {
        "rows": launch.rows,
        "hidden_block": launch.hidden,
        "warps": launch.warps,
        "stages": launch.stages,
        "programs": launch.programs,
    }
    about = {"kernel": direction, "kind": name, "chunk": chunk, "hidden": hidden, "dtype": dtype, "capability": capability}
    return {**about, **settings, **needs(binary, bound, limit)}


def telemetry_row(width: int, seeds: int, dtype: str, capability: int, copies: bool) -> dict[str, object] | None:
    """The same of the whole-row telemetry kernel, alone or copying what passes; None where rows are too wide for it."""
    limit = DEVICES[capability]
    launch = launch_rules.whole_rows(width, seeds, 65536, ITEMSIZE[dtype], limit, copies)
    if launch is None:
        return None
    chunk, even = -(-width // seeds), width % seeds == 0
    fixed = {
        "BM": launch.rows, "SP": launch.seeds, "CP": launch.places, "C": chunk, "EVEN": even, "FLAT": True, "STAGES": launch.stages,
        "xc": 1,
        "FULL": width == seeds * launch.places and seeds == launch.seeds, "COPY": copies, "BANKS": int(copies),
        "RB": launch_rules.power_of_two(seeds), "yc": 1,
    }  # fmt: skip
    binary = compiled(telemetry_kernels.whole_rows_kernel, fixed, dtype, launch.warps, capability)
    name = "telemetry, copying" if copies else "telemetry"
    about = {"kernel": name, "kind": f"{seeds} seeds", "chunk": chunk, "hidden": 0, "dtype": dtype, "capability": capability}
    settings = {"rows": launch.rows, "hidden_block": 0, "warps": launch.warps, "stages": launch.stages, "programs": launch.parts}
    bound = launch_rules.whole_rows_shared(launch.rows, launch.seeds * launch.places, ITEMSIZE[dtype], launch.stages, copies)
    return {**about, **settings, **needs(binary, bound, limit)}


def windows_row(width: int, seeds: int, dtype: str, capability: int) -> dict[str, object] | None:
    """The same of the kernel over windows of narrow chunks; None where they are wider."""
    limit = DEVICES[capability]
    launch = launch_rules.windows(width, seeds, 65536, limit)
    if launch is None:
        return None
    chunk = -(-width // seeds)
    fixed = {
        "G": launch.seeds, "GP": launch.places, "WC": launch.width, "BM": launch.rows, "TM": launch.totals_rows, "ALIGN": 8, "WHOLE": True,
        "C": chunk, "EVEN": width % seeds == 0, "FLAT": True, "XR": width, "PRECISION": "ieee", "xc": 1,
    }  # fmt: skip
    binary = compiled(telemetry_kernels.windows_kernel, fixed, dtype, 4, capability, 3)
    about = {
        "kernel": "telemetry, windows",
        "kind": f"{seeds} seeds",
        "chunk": chunk,
        "hidden": 0,
        "dtype": dtype,
        "capability": capability,
    }
    settings = {"rows": launch.rows, "hidden_block": 0, "warps": 4, "stages": 3, "programs": -(-seeds // launch.seeds) * launch.parts}
    return {**about, **settings, **needs(binary, launch_rules.windows_shared(launch, ITEMSIZE[dtype]), limit)}


def needs(binary, bound: int, limit: Limits) -> dict[str, object]:
    """Registers, spilled bytes and shared memory of a compiled kernel, beside the estimate and the device's limit."""
    registers, spilled = registers_and_spills(binary.asm["cubin"])
    return {
        "registers": registers, "spilled": spilled, "shared": binary.metadata.shared, "estimate": bound, "limit": limit.shared,
        "triton": triton.__version__,
    }  # fmt: skip


def main(argv: list[str]) -> int:
    """Compile the asked shapes and kinds for all three capabilities."""
    parser = argparse.ArgumentParser(prog="scripts/bench kernel_resources", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("outputs/bench/kernel_resources.csv"))
    parser.add_argument("--shapes", nargs="+", default=["32x32", "64x64", "128x128", "128x256"], help="chunk x hidden")
    parser.add_argument("--kinds", nargs="+", default=["mlp_relu", "glu"])
    parser.add_argument("--dtypes", nargs="+", default=["bf16", "fp32"])
    parser.add_argument("--directions", nargs="*", default=list(DIRECTIONS))
    parser.add_argument("--sites", nargs="*", default=list(SITES), help="width x seeds, for the telemetry kernel")
    options = parser.parse_args(argv)
    found = []
    for shape in options.shapes:
        chunk, hidden = (int(part) for part in shape.split("x"))
        for name in options.kinds:
            for dtype in options.dtypes:
                for capability in DEVICES:
                    found += [row(direction, name, chunk, hidden, dtype, capability) for direction in options.directions]
    for site in options.sites:
        width, seeds = (int(part) for part in site.split("x"))
        for dtype in options.dtypes:
            for capability in DEVICES:
                found += [telemetry_row(width, seeds, dtype, capability, copies) for copies in (False, True)]
                found.append(windows_row(width, seeds, dtype, capability))
    rows = [made for made in found if made is not None]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    worst = max(rows, key=lambda r: int(str(r["shared"])) / int(str(r["limit"])))
    print(f"{len(rows)} kernels compiled; largest share of a device's shared memory: {worst}")
    over = [made for made in rows if not int(str(made["shared"])) <= int(str(made["estimate"])) <= int(str(made["limit"]))]
    for made in over:
        print(f"needs more than its rule says, or the device has: {made}")
    return int(bool(over))
