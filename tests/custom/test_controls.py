"""Does growing pay for a user's own model on the user's own data? All six controls, from an empty folder with the wheel installed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

User = Callable[..., Any]

ARMS = ["grown", "host", "scratch", "scratch_macs", "all_on", "random_places", "naive"]
NET = """
from torch import nn

class Net(nn.Sequential):
    def __init__(self, task, width=6):
        fc1, fc2 = nn.Linear(task.input_shape[0], width), nn.Linear(width, width)
        super().__init__(fc1, nn.ReLU(), fc2, nn.ReLU(), nn.Linear(width, task.outputs))
"""
CASES = {
    "shipped": ["model=mlp", "task=mnist1d"],
    "own": ["model=custom", "model.target=my_net:Net", "task=custom", "task.target=my_pkg.data:waves", "sites.match=['0','2']"],
}

pytestmark = pytest.mark.e2e


@pytest.mark.parametrize("case", list(CASES))
def test_all_controls_run_and_end_in_a_figure_and_a_sentence(case: str, user: User, home: Path) -> None:
    (home / "my_net.py").write_text(NET)
    words = ["experiment=controls", *CASES[case], "seed=0,1", "trainer.steps=100", "trainer.control=false", "tracking=none"]
    ran = user(*words, "output=controls", f"hydra.sweep.dir=controls/{case}", allow="my_pkg,my_net")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    found = json.loads((home / "controls" / case / "comparison.json").read_text())
    arms = {arm["arm"]: arm for arm in found["arms"]}
    assert list(arms) == ARMS
    assert {arm["runs"] - arm["failed"] for arm in arms.values()} == {2}
    assert {name for name, arm in arms.items() if not arm["growth"]["germinations"]} == {"host"}
    assert arms["scratch_macs"]["costs"]["macs"] == pytest.approx(arms["grown"]["costs"]["macs"], rel=0.05)
    said = " ".join(ran.stdout.split())
    assert said.count("whether growing paid") + said.count("Growing paid:") + said.count("Growing did not pay:") == 1
    assert (home / "controls" / case / "figures" / "cost.png").read_bytes().startswith(b"\x89PNG")
