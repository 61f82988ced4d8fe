"""The launch rule keeps within every device's limits, and the compiler agrees with its estimates."""

import csv
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest

from esper.kernels import launch
from esper.kernels.launch import Limits

DEVICES = {
    "A100": Limits((8, 0), 108, 166_912),
    "16 GB Ada": Limits((8, 9), 34, 101_376, 65536, 1536),
    "H200": Limits((9, 0), 132, 232_448),
}


@pytest.mark.parametrize("device", DEVICES)
def test_every_branch_the_kernels_take_fits(device):
    limit = DEVICES[device]
    for chunk, hidden, gated, itemsize in itertools.product((16, 32, 64, 128), (16, 32, 64, 128, 256), (False, True), (2, 4)):
        forward = launch.forward(chunk, hidden, gated, False, itemsize, 64, limit)
        backward = launch.backward(chunk, hidden, gated, False, itemsize, 64, limit)
        assert launch.forward_shared(forward.rows, chunk, forward.hidden, gated, itemsize, forward.stages) <= limit.shared
        assert launch.backward_shared(backward.rows, chunk, backward.hidden, gated, itemsize, backward.stages) <= limit.shared
        for plan in (forward, backward):
            assert plan.rows >= 16
            assert plan.hidden >= 16
            assert plan.programs >= 64
            assert plan.programs // limit.processors * plan.warps * 32 <= limit.threads


def test_the_rule_does_not_change_with_what_is_active():
    assert launch.forward(64, 64, False, False, 2, 64, DEVICES["H200"]) == launch.forward(64, 64, False, False, 2, 64, DEVICES["H200"])


def test_compiled_kernels_need_no_more_shared_memory_than_estimated(tmp_path):
    """Triton compiles for a device that is not there; a process of its own, because this one may be interpreting."""
    out = tmp_path / "resources.csv"
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    script = "import sys; from scripts.benchmarks.kernel_resources import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", script, "--out", str(out), "--shapes", "32x32", "--kinds", "mlp_relu", "--dtypes", "bf16"]
    subprocess.run(command, check=True, env=environment, cwd=Path(__file__).parents[2], capture_output=True, timeout=300)
    rows = list(csv.DictReader(out.open()))
    assert {row["capability"] for row in rows} == {"80", "89", "90"}
    assert all(int(row["shared"]) <= int(row["estimate"]) <= int(row["limit"]) for row in rows)
    assert all(int(row["spilled"]) == 0 for row in rows)
