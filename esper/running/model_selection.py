"""``trainer.keep=better``: where growing did not pay, the never-grown host takes the grown one's place at the end of the run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import nn

from esper.engine.port import Port
from esper.messages import Alert
from esper.report.summary_file import GrownSummary, Summary
from esper.trainer.evaluation import fingerprint
from esper.trainer.trainer import Trainer

CODE = "never_grown_kept"


def worse_than_alone(grown: float | None, alone: float | None, direction: str) -> bool:
    """Whether the host alone is better by this metric. A grown host whose value is not a number is worse than any number."""
    if alone is None or not math.isfinite(alone):
        return False
    if grown is None or not math.isfinite(grown):
        return True
    return alone > grown if direction == "max" else alone < grown


def replaces(summary: Summary, alone: Mapping[str, Any]) -> bool:
    """Whether the control ``alone`` is to take the place of the run's grown host: its validation metric decides."""
    primary = summary["primary"]
    return worse_than_alone(summary["metrics"]["final"].get(primary), alone["metrics"].get(primary), summary["direction"])


def put_in_place(host: nn.Module, alone: Mapping[str, Any], summary: Summary, trainer: Trainer) -> None:
    """Make ``summary`` that of the never-grown ``host``.

    Metrics, branches, parameters and fingerprint become the host's; those of the grown one stay under ``grown``. Counts of seeds,
    gates, MACs and history tell of the run, and stay.
    """
    primary = summary["primary"]
    grown, now = summary["metrics"]["final"].get(primary), alone["metrics"][primary]
    text = f"growing did not pay here: the never-grown host was kept ({primary} {now:.4g}, and {_shown(grown)} grown)"
    summary["grown"] = GrownSummary(
        metrics=summary["metrics"], branches=summary["branches"], parameters=summary["parameters"], fingerprint=summary["fingerprint"]
    )
    summary["kept"] = {"host": "never grown", "why": text}
    summary["metrics"] = {"final": dict(alone["metrics"]), "best": dict(alone["best"])}
    summary["branches"] = []
    summary["parameters"] = {"before": trainer.host_parameters, "after": trainer.host_parameters}
    summary["fingerprint"] = fingerprint(host.state_dict(), trainer.outcome.history)


def announce(summary: Summary, port: Port) -> None:
    """The alert, once the model that the run leaves is the never-grown one."""
    port.emit(Alert(tick=summary["ticks"], level="warning", code=CODE, text=summary["kept"]["why"]))


def _shown(value: float | None) -> str:
    return "no number" if value is None or not math.isfinite(value) else f"{value:.4g}"
