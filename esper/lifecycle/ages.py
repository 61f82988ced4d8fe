"""Minimum and maximum ages of the stages in ticks, and the check that every stage can be left in time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from esper.errors import UserError
from esper.lifecycle.config import LifecycleConfig
from esper.lifecycle.duration import parse
from esper.lifecycle.stages import Stage

TIMEOUT: dict[Stage, Stage] = {
    Stage.GERMINATED: Stage.CANCELLED,
    Stage.TRAINING: Stage.CULLED,
    Stage.GRAFTING: Stage.CULLED,
    Stage.STABILIZATION: Stage.ROLLED_BACK,
    Stage.EVALUATING: Stage.CULLED,
    Stage.FINE_TUNING: Stage.CULLED,
    Stage.CULLED: Stage.DORMANT,
    Stage.CANCELLED: Stage.DORMANT,
    Stage.ROLLED_BACK: Stage.DORMANT,
}
"""Where a seed goes that reached its stage's maximum age."""


@dataclass(frozen=True)
class Ages:
    """Ticks: ``minimum[stage]`` before a gate may open, ``maximum[stage]`` after which TIMEOUT applies."""

    minimum: dict[Stage, int]
    maximum: dict[Stage, int]
    ramp: int
    fade: int
    judge_every: int
    warmup: int
    untie: int | None = None
    """Of blending, before blocks that share the host's weights get their own; None: they never do."""

    def path(self) -> list[tuple[Stage, int, int]]:
        """(stage, earliest, latest) ticks after germination of each stage on the way to FOSSILIZED."""
        rows, earliest, latest = [], 0, 0
        for stage in (Stage.GERMINATED, Stage.TRAINING, Stage.GRAFTING, Stage.STABILIZATION, Stage.EVALUATING, Stage.FINE_TUNING):
            rows.append((stage, earliest, latest))
            earliest += self.minimum[stage]
            latest += self.maximum[stage]
        rows.append((Stage.FOSSILIZED, earliest, latest))
        return rows


def resolve(
    config: LifecycleConfig,
    ramp: str,
    warmup: str,
    total_ticks: int,
    ticks_per_epoch: int,
    steps_per_tick: int = 1,
    longest_ramp: Callable[[int], int] | None = None,
    growing: bool = True,
) -> Ages:
    """Durations → ticks for a run of ``total_ticks``; raises UserError naming a stage that could never be left.

    ``longest_ramp`` tells how many ticks the grafting strategy may take at worst for a ramp of that many ticks.
    If not ``growing``, no controller starts anything, so that no stage has to be left.
    """

    def ticks(text: str) -> int:
        return parse(text).ticks(total_ticks, ticks_per_epoch, steps_per_tick)

    fade, ramp_ticks = ticks(config.fade), ticks(ramp)
    minimum = {
        Stage.GERMINATED: 1,
        Stage.TRAINING: ticks(config.training_min),
        Stage.GRAFTING: max(1, ramp_ticks, ticks(config.grafting_min)),
        Stage.STABILIZATION: ticks(config.stabilization_min),
        Stage.EVALUATING: ticks(config.evaluating_min),
        Stage.FINE_TUNING: ticks(config.fine_tuning_min),
        Stage.CULLED: 1,
        Stage.CANCELLED: 0,
        Stage.ROLLED_BACK: 0,
    }
    maximum = {
        Stage.GERMINATED: ticks(config.germinated_max),
        Stage.TRAINING: ticks(config.training_max),
        Stage.GRAFTING: ticks(config.grafting_max),
        Stage.STABILIZATION: ticks(config.stabilization_max),
        Stage.EVALUATING: ticks(config.evaluating_max),
        Stage.FINE_TUNING: ticks(config.fine_tuning_max),
        Stage.CULLED: fade + max(1, ticks(config.embargo)),
        Stage.CANCELLED: 1,
        Stage.ROLLED_BACK: max(1, ticks(config.embargo)),
    }
    ages = Ages(minimum, maximum, ramp_ticks, fade, max(1, ticks(config.judge_every)), max(1, ticks(warmup)))
    if not growing:
        return ages
    _check(ages, total_ticks)
    if longest_ramp is not None:
        _check_ramp(ages, longest_ramp(max(1, ramp_ticks)))
    return ages


def _check_ramp(ages: Ages, longest: int) -> None:
    most = ages.maximum[Stage.GRAFTING]
    if longest > most:
        raise UserError(
            f"GRAFTING may never be left by its gate: the ramp can take {longest} ticks, holds included, but the stage is ended "
            f"after {most}; raise lifecycle.grafting_max, shorten grafting.ramp or lower grafting.max_hold."
        )


def _check(ages: Ages, total_ticks: int) -> None:
    for stage, low in ages.minimum.items():
        high = ages.maximum[stage]
        if high < max(low, 1):
            raise UserError(
                f"{stage.name} can never be left: it needs at least {max(low, 1)} ticks but is ended after {high}; "
                f"raise lifecycle.{stage.name.lower()}_max"
                + (" or shorten grafting.ramp" if stage is Stage.GRAFTING else f" or lower lifecycle.{stage.name.lower()}_min")
                + "."
            )
    shortest = ages.path()[-1][1]
    if shortest > total_ticks:
        stage = next(stage for stage, earliest, _ in reversed(ages.path()[:-1]) if earliest <= total_ticks)
        raise UserError(
            f"The run has {total_ticks} ticks, but the shortest way to FOSSILIZED takes {shortest}: {stage.name} can never be left; "
            "train longer (trainer.steps) or shorten the lifecycle's durations."
        )
