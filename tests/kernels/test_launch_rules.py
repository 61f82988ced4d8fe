"""The launch rule keeps within every device's limits, and the compiler agrees with its estimates."""

import csv
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest

from esper.kernels import launch_rules
from esper.kernels.launch_rules import Limits

DEVICES = {
    "A100": Limits((8, 0), 108, 166_912),
    "16 GB Ada": Limits((8, 9), 34, 101_376, 65536, 1536),
    "H200": Limits((9, 0), 132, 232_448),
}


@pytest.mark.parametrize("device", DEVICES)
def test_every_branch_the_kernels_take_fits(device):
    limit = DEVICES[device]
    widths, yes_no = (16, 32, 64, 128), (False, True)
    for chunk, hidden, gated, itemsize, objectives in itertools.product(widths, (*widths, 256), yes_no, (2, 4), yes_no):
        forward = launch_rules.forward(chunk, hidden, gated, False, itemsize, 64, limit)
        plain = launch_rules.forward(chunk, hidden, gated, False, itemsize, 64, limit, telemetry=False)
        backward = launch_rules.backward(chunk, hidden, gated, False, itemsize, 64, limit, objectives)
        split = hidden > backward.hidden
        assert launch_rules.forward_shared(forward.rows, chunk, forward.hidden, gated, itemsize, forward.stages) <= limit.shared
        sizes = (backward.rows, chunk, backward.hidden, gated, itemsize, backward.stages)
        assert launch_rules.backward_shared(*sizes, split, objectives) <= limit.shared
        assert (plain.rows, plain.hidden, plain.warps) == (forward.rows, forward.hidden, forward.warps), "one kernel holds both walks"
        assert launch_rules.forward_shared(plain.rows, chunk, plain.hidden, gated, itemsize, plain.stages) <= limit.shared
        alone = launch_rules.input_gradient(chunk, hidden, gated, itemsize, 64, limit, backward) if split else backward
        if split:
            sizes = (alone.rows, chunk, alone.hidden, gated, itemsize, alone.stages)
            assert launch_rules.input_gradient_shared(*sizes, alone.hidden < hidden) <= limit.shared
        for launch in (forward, backward, alone):
            assert launch.rows >= 16
            assert launch.hidden >= 16
            assert launch.programs >= 64
            assert launch.programs // limit.processors * launch.warps * 32 <= limit.threads


@pytest.mark.parametrize("device", DEVICES)
def test_telemetry_of_whole_rows_fits_whatever_the_width_and_precision(device):
    limit = DEVICES[device]
    for width, seeds, itemsize in itertools.product((64, 3072, 4096, 8192), (1, 12, 64, 1000, 4096), (2, 4)):
        for copies in (False, True):
            launch = launch_rules.whole_rows(width, seeds, 65536, itemsize, limit, copies) if seeds <= width else None
            if launch is None:
                continue
            assert (
                launch_rules.whole_rows_shared(launch.rows, launch.seeds * launch.places, itemsize, launch.stages, copies) <= limit.shared
            )
            assert launch.warps * 32 <= 1024
    assert launch_rules.whole_rows(8192, 64, 65536, 4, DEVICES["16 GB Ada"]).stages == 4, "five stages of 32 KB are more than it has"


@pytest.mark.parametrize("device", DEVICES)
def test_windows_hold_their_chunks_wherever_they_begin_and_fit(device):
    for width, seeds in ((3072, 1000), (64, 32), (61, 20), (4096, 4096), (2048, 256)):
        launch = launch_rules.windows(width, seeds, 65536, DEVICES[device])
        bounds = [seed * width // seeds for seed in range(seeds + 1)]
        for first in range(0, seeds, launch.seeds):
            assert bounds[min(first + launch.seeds, seeds)] - bounds[first] // 8 * 8 <= launch.width
        assert launch_rules.windows_shared(launch, 4) <= DEVICES[device].shared
    assert launch_rules.windows(4096, 64, 65536, DEVICES[device]) is None, "64 features are not narrow"


def test_the_rule_does_not_change_with_what_is_active():
    assert launch_rules.forward(64, 64, False, False, 2, 64, DEVICES["H200"]) == launch_rules.forward(
        64, 64, False, False, 2, 64, DEVICES["H200"]
    )


@pytest.mark.usefixtures("processes")
def test_compiled_kernels_need_no_more_shared_memory_than_estimated(tmp_path):
    """Triton compiles for a device that is not there; a process of its own, because this one may be interpreting."""
    out = tmp_path / "resources.csv"
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    script = "import sys; from scripts.benchmarks.kernel_resources import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", script, "--out", str(out), "--shapes", "32x32", "--kinds", "mlp_relu", "--dtypes", "bf16"]
    command += ["--directions", "forward", "backward", "backward with objectives", "--sites", "3072x1000"]
    subprocess.run(command, check=True, env=environment, cwd=Path(__file__).parents[2], capture_output=True, timeout=300)
    rows = list(csv.DictReader(out.open()))
    assert {row["capability"] for row in rows} == {"80", "89", "90"}
    assert all(int(row["shared"]) <= int(row["estimate"]) <= int(row["limit"]) for row in rows)
    assert all(int(row["spilled"]) == 0 for row in rows if "objectives" not in row["kernel"])
