"""What an MLflow run held before it was continued, so that a resumed run's history has neither hole nor double."""

from __future__ import annotations

from typing import TYPE_CHECKING

from esper.lifecycle.stages import Stage

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

STAGES = {stage.name.lower(): int(stage) for stage in Stage}


class Continued:
    """Steps and values of a run's metrics as an earlier life left them; read once, when the run is continued."""

    def __init__(self, client: MlflowClient, run_id: str) -> None:
        names = client.get_run(run_id).data.metrics
        ends = {name: name.rsplit("/", 1)[-1] for name in names}
        wanted = [n for n, end in ends.items() if n.startswith("alerts/") or end.startswith("seeds_") or "second" in end]
        self._steps = {name: [(point.step, point.value) for point in client.get_metric_history(run_id, name)] for name in wanted}

    def last_tick(self, name: str) -> int:
        """The last tick of a metric, −1 where there is none."""
        return max((step for step, _ in self._steps.get(name, [])), default=-1)

    def seeds_until(self, tick: int) -> dict[str, tuple[int, set[int]]]:
        """By site: the last tick, up to ``tick``, at which ``sites/<site>/seeds_<stage>`` was given, and the stages known by then."""
        found: dict[str, tuple[int, set[int]]] = {}
        for name, points in self._steps.items():
            steps = [step for step, _ in points if step <= tick]
            site, _, kind = name.removeprefix("sites/").rpartition("/")
            if name.startswith("sites/") and kind.startswith("seeds_") and steps:
                stage = kind.removeprefix("seeds_")
                last, stages = found.get(site, (-1, set()))
                found[site] = (max(last, *steps), stages | {STAGES[stage]})
        return found

    def alerts_until(self, tick: int) -> dict[str, int]:
        """How many alerts of each level there were up to ``tick``."""
        counts: dict[str, int] = {}
        for name, points in self._steps.items():
            values = [int(value) for step, value in points if step <= tick]
            if name.startswith("alerts/") and values:
                counts[name.removeprefix("alerts/")] = max(values)
        return counts
