"""The one table of transitions: the stages that may follow each stage, and the role of each in the forward pass."""

from __future__ import annotations

from esper.lifecycle.stages import Stage

EXITS: dict[Stage, frozenset[Stage]] = {
    Stage.DORMANT: frozenset({Stage.GERMINATED}),
    Stage.GERMINATED: frozenset({Stage.TRAINING, Stage.CANCELLED}),
    Stage.TRAINING: frozenset({Stage.GRAFTING, Stage.CULLED, Stage.CANCELLED, Stage.ROLLED_BACK}),
    Stage.GRAFTING: frozenset({Stage.STABILIZATION, Stage.CULLED, Stage.ROLLED_BACK}),
    Stage.STABILIZATION: frozenset({Stage.EVALUATING, Stage.ROLLED_BACK}),
    Stage.EVALUATING: frozenset({Stage.FINE_TUNING, Stage.CULLED, Stage.ROLLED_BACK}),
    Stage.FINE_TUNING: frozenset({Stage.FOSSILIZED, Stage.CULLED, Stage.ROLLED_BACK}),
    Stage.FOSSILIZED: frozenset(),
    Stage.CULLED: frozenset({Stage.DORMANT}),
    Stage.CANCELLED: frozenset({Stage.DORMANT}),
    Stage.ROLLED_BACK: frozenset({Stage.DORMANT}),
}

RESEEDED: frozenset[Stage] = frozenset({Stage.GERMINATED})
"""Exits of FOSSILIZED where ``lifecycle.reseed`` allows a new generation; the fossil's branch stays with its site."""

BLENDED: frozenset[Stage] = frozenset({Stage.GRAFTING, Stage.STABILIZATION, Stage.EVALUATING, Stage.FINE_TUNING, Stage.FOSSILIZED})
"""Stages whose branch adds to the host's forward pass (a CULLED one does too while it fades)."""

LEARNS_FROM_TASK: frozenset[Stage] = frozenset({Stage.GRAFTING, Stage.FINE_TUNING})
"""Stages whose branch parameters receive the task's gradient."""

NO_MINIMUM_AGE: frozenset[Stage] = frozenset({Stage.CANCELLED, Stage.ROLLED_BACK})
"""Targets that may be reached from a stage of any age."""


def exits(source: Stage, reseed: bool = False) -> frozenset[Stage]:
    """The stages that may follow ``source``; ``reseed`` opens FOSSILIZED to a new generation."""
    return RESEEDED if reseed and source is Stage.FOSSILIZED else EXITS[source]


def refusal(source: Stage, target: Stage, reseed: bool = False) -> str | None:
    """Why ``source → target`` is impossible, in words, or None where it is allowed."""
    possible = exits(source, reseed)
    if target in possible:
        return None
    names = ", ".join(stage.name for stage in sorted(possible)) or "none"
    return f"{source.name} cannot become {target.name}; possible next stages: {names}"
