"""The summary of a run, from what the trainer knows when it ends — finished, interrupted or failed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from esper.config import RootConfig, config_hash
from esper.report.summary_file import Summary
from esper.running.environment import environment
from esper.running.environments import lives
from esper.running.profiling import NAME as TRACE
from esper.trainer.fingerprint import fingerprint
from esper.trainer.trainer import Trainer


def summarize(config: RootConfig, trainer: Trainer, folder: Path, run: str, status: str, alerts: list[dict[str, Any]]) -> Summary:
    """Everything but the controls, which are made afterwards."""
    grow, outcome = trainer.grow, trainer.outcome
    grown = grow.export().state_dict()
    registry = grow.registry
    gates = {
        name: {"closest": record.closest, "threshold": record.threshold, "asked": record.asked, "passed": record.passed}
        for name, record in grow.gates.records.items()
    }
    seconds = {"total": grow.clock.total, **{name: grow.clock.seconds.get(name, 0.0) for name in ("shadow", "judge")}}
    primary = trainer.task.primary
    return Summary(
        run=run,
        name=config.name,
        status=status,
        primary=f"validation/{primary}",
        direction=trainer.task.metrics[primary].direction,
        ticks=grow.tick_number,
        steps=outcome.steps,
        metrics={"final": outcome.final, "best": outcome.best},
        seeds=dict(grow.transitions.counts),  # type: ignore[typeddict-item]
        branches=grow.observer.branch_cards(),  # type: ignore[typeddict-item]
        gates=gates,  # type: ignore[typeddict-item]
        refusals=dict(grow.executor.refusals),
        parameters={"before": trainer.host_parameters, "after": trainer.parameters},
        macs=grow.meter.total,
        macs_by_pass=dict(sorted(grow.meter.spent.items())),  # type: ignore[typeddict-unknown-key]
        seconds=seconds,  # type: ignore[typeddict-item]
        stages=registry.table.counts(),  # type: ignore[typeddict-unknown-key]
        environment=environment(trainer.device),
        environments=lives(folder),
        fingerprint=fingerprint(grown, outcome.history),
        alerts=alerts,
        output=str(folder),
        **({"trace": str(folder / TRACE)} if (folder / TRACE).exists() else {}),  # type: ignore[typeddict-item]
        config_hash=config_hash(config),
        data=trainer.task.digest,  # type: ignore[typeddict-unknown-key]
        seed=config.seed,  # type: ignore[typeddict-unknown-key]
    )
