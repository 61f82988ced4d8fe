"""Local controllers in processes of their own: what they propose is granted, one that is killed is noticed, and goes on when it is back."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from scripted_trainer import COLUMNS, ScriptedTrainer

from esper.bus import open_bus
from esper.bus.config import EmbeddedConfig
from esper.bus.discovery import invite
from esper.bus.programs import controller as control_program
from esper.bus.trainer.bus_port import BusPort
from esper.controllers import ControllerRunner
from esper.controllers.hierarchical import HierarchicalConfig
from esper.errors import UserError
from esper.lifecycle.stages import Stage
from esper.messages import Transition

SETTINGS: dict[str, Any] = {
    "local": "scheduled",
    "local_settings": {"script": [{"at": f"{at}step", "command": "germinate", "site": "*", "count": 1} for at in range(1, 10_000, 40)]},
    "remote": ["fc1"],
    "round": "2step",
    "silence": "250step",
    "max_active": 6,
}
TOTAL = 100_000


ROOT = Path(__file__).resolve().parents[3]


def local(folder: Path) -> subprocess.Popen[str]:
    """``esper control <folder> --group fc1`` as a process."""
    code = "import sys; from esper.bus.programs.controller import main; sys.exit(main(sys.argv[1:]))"
    words = [sys.executable, "-c", code, str(folder), "--group", "fc1"]
    return subprocess.Popen(words, env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=subprocess.DEVNULL, text=True)


class Run:
    """A trainer whose allocator is in its process and whose only local controller is not."""

    def __init__(self, folder: Path) -> None:
        self.bus = open_bus(EmbeddedConfig(claim_s=1.0), folder)
        invite(folder, "run", self.bus.config, {"config": {"seed": 3, "controller": {"name": "hierarchical", **SETTINGS}}})
        self.controller = HierarchicalConfig(**SETTINGS).build(3)
        runner = ControllerRunner(self.bus.local, "run", self.controller, beyond=self.bus)
        self.alerts: list[str] = []
        self.port = BusPort(self.bus, "run", COLUMNS, runner=runner)
        self.trainer = ScriptedTrainer(self.port, TOTAL, step_s=0.002)
        self.trainer.start()

    def until(self, reached: Callable[[], bool]) -> None:
        """Train until something has happened."""
        deadline = time.monotonic() + 120
        while not reached():
            assert time.monotonic() < deadline, (self.trainer.tick, self.controller.groups["fc1"])
            self.trainer.step()

    def end(self) -> None:
        self.trainer.end()
        self.bus.close()


@pytest.mark.usefixtures("processes")
def test_a_killed_local_controller_is_noticed_its_seeds_are_held_and_it_goes_on(tmp_path: Path):
    run = Run(tmp_path)
    control = local(tmp_path)
    try:
        run.until(lambda: any(run.trainer.stages))
        group = run.controller.groups["fc1"]
        assert not group.dead and group.heard > 0
        control.kill()
        control.wait()
        run.until(lambda: group.dead)
        before = len(run.trainer.applied)
        run.port.emit(Transition(tick=run.trainer.tick, site="fc1", seed=2, branch=0, source=2, target=int(Stage.GRAFTING), cause=""))
        run.until(lambda: len(run.trainer.applied) > before)
        assert group.held == [("fc1", 2)], "the trainer is told to hold it"
        silent = group.heard
        control = local(tmp_path)
        run.until(lambda: not group.dead)
        assert group.heard > silent and group.held == []
        germinated = len(run.trainer.applied)
        run.until(lambda: len(run.trainer.applied) > germinated + 2)
        run.trainer.end()
        assert control.wait(60) == 0
    finally:
        control.kill()
        run.bus.close()


@pytest.mark.usefixtures("processes")
def test_a_group_that_is_not_elsewhere_is_refused_in_a_sentence(tmp_path: Path):
    run = Run(tmp_path)
    with pytest.raises(UserError, match=r"--group fc9 is none of the run's controller\.remote: it names fc1"):
        control_program.main([str(tmp_path), "--group", "fc9"])
    run.end()
