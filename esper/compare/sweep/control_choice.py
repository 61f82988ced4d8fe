"""Which controls a job of a sweep trains: those that the sweep's report shows, and none that is an arm already."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from esper.compare.sweep.jobs import Prepared
from esper.compare.sweep.tuning import TuningJob
from esper.config import plain
from esper.running.control_runs import DEPENDS_ON, SAME_MACS, SAME_STEPS, UNUSED, controls_of


def shown(one: Prepared, jobs: Sequence[Prepared]) -> list[str]:
    """The controls of this job.

    The report compares arms. It shows the host alone beside them where ``trainer.control=true`` asks for it; the default is for single
    runs. ``trainer.keep=better`` needs the control at the same steps, weights and all. Nobody reads the controls of a job that tunes.
    """
    trainer = one.config.trainer
    if isinstance(one.job, TuningJob):
        asked: list[str] = []
    else:
        arms = _arms(one, jobs) if trainer.control else []
        asked = [name for name in (SAME_STEPS, SAME_MACS) if trainer.control and name not in arms]
    needed = [SAME_STEPS] if trainer.keep == "better" and SAME_STEPS not in asked else []
    return [name for name in (*needed, *asked) if name in controls_of(one.config)]


def _arms(one: Prepared, jobs: Sequence[Prepared]) -> list[str]:
    """The controls of this job that are arms: a host alone that differs in nothing else, at as many steps or at as many MACs."""
    found, compare = [], one.config.compare
    place, settings = (one.job.block, one.job.seed), _settings(one)
    for other in jobs:
        arm = other.job.arm
        if controls_of(other.config) or (other.job.block, other.job.seed) != place or _settings(other) != settings:
            continue
        budget = compare.equal_macs.get(arm, "").partition("/")[0]
        if budget == one.job.arm:
            found.append(SAME_MACS)
        elif not budget and arm not in compare.fresh_seeds and one.job.arm not in (*compare.equal_macs, *compare.fresh_seeds):
            found.append(SAME_STEPS)
    return found


def _settings(one: Prepared) -> dict[str, Any]:
    """What a control depends on."""
    tree = plain(one.config)
    trainer = {key: value for key, value in tree["trainer"].items() if key not in UNUSED}
    return {key: tree[key] for key in DEPENDS_ON} | {"trainer": trainer}
