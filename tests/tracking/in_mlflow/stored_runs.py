"""Runs written to MLflow by the tests, and the history of their values."""

from __future__ import annotations

from esper.tracking import MlflowConfig
from esper.tracking.mlflow_run import MlflowRun

LIGHT = {"figures": False, "model": False, "system_s": 0.0}


def tracked(info, messages, status: str = "FINISHED", summary=None, **options) -> MlflowRun:
    run = MlflowRun(MlflowConfig(**(LIGHT | options)))
    run.open(info)
    run.record(messages)
    run.close(status, summary or {})
    return run


def history(client, run: MlflowRun, name: str) -> list[tuple[int, int, float]]:
    return [(m.step, m.timestamp, m.value) for m in client.get_metric_history(run.run_id, name)]
