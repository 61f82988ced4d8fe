"""The result of a search: its trials, the best one or the front, and what came of it in sentences."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field

from esper.compare.results.tables import number
from esper.compare.search.trials import DONE, FAILED, PRUNED, Goal
from esper.search.config import COSTS, QUALITY
from esper.search.space import shown, words
from esper.search.study import Study, best_first

STATES = {"COMPLETE": DONE, "PRUNED": PRUNED, "FAIL": FAILED}


@dataclass(frozen=True)
class TrialResult:
    """One trial: how it ended, its values as they would be typed, and its numbers (NaN where it has none)."""

    number: int
    state: str
    values: dict[str, str]
    quality: float = math.nan
    test: float = math.nan
    parameters: float = math.nan
    macs: float = math.nan
    looks: dict[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class SearchResult:
    """All trials of a search that have ended; ``front`` has the numbers of the best one, or of those that no other is better than."""

    goal: Goal
    trials: tuple[TrialResult, ...]
    front: tuple[int, ...]
    importances: dict[str, float]
    fixed: tuple[str, ...]
    sampler: str

    @property
    def finished(self) -> list[TrialResult]:
        """The trials that came to their end, best first."""
        done = [one for one in self.trials if one.state == DONE]
        return [done[at] for at in best_first([one.quality for one in done], self.goal.sign)]

    def command(self, one: TrialResult) -> str:
        """The command that trains a trial's settings again, controls and all."""
        return shlex.join(["esper", *self.fixed, *words(one.values)])

    def sentences(self) -> list[str]:
        """What came of the search."""
        counts = {state: sum(one.state == state for one in self.trials) for state in (DONE, PRUNED, FAILED)}
        told = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
        lines = [f"{len(self.trials)} trials: {told or 'none ended'}."]
        if not self.finished:
            return lines
        best = self.finished[0]
        test = "" if math.isnan(best.test) else f", {number(best.test)} on the test set"
        lines.append(
            f"Best {self.goal.metric}: trial {best.number}, {number(best.quality)} on validation{test}, with {shown(best.values)}."
        )
        if counts[DONE] > 1:
            lines.append(
                f"It is the best of {counts[DONE]} by validation, so its validation value looks too good; the test set had no part."
            )
        if len(self.goal.objectives) > 1:
            lines.append(f"No trial is better in everything ({', '.join(self.goal.objectives)}) than {_listed(self.front)}.")
        if self.importances:
            shares = ", ".join(f"{key.lstrip('+')} {share:.0%}" for key, share in self.importances.items())
            lines.append(f"Shares in the spread of {self.goal.objectives[0]} (fANOVA): {shares}.")
        return lines


def _listed(front: Sequence[int]) -> str:
    return f"the {len(front)} of the front ({', '.join(map(str, front))})"


def result_of(study: Study, goal: Goal, fixed: Sequence[str]) -> SearchResult:
    """The result of the trials that have ended."""
    trials = []
    for one in study.trials:
        if one.state.name not in STATES:
            continue
        kept = {name: float(one.user_attrs[name]) for name in (QUALITY, "test", *COSTS) if name in one.user_attrs}
        trials.append(TrialResult(one.number, STATES[one.state.name], study.space.texts(one.params), looks=one.intermediate_values, **kept))
    finished = any(one.state == DONE for one in trials)
    importances = study.importances() if finished else {}
    return SearchResult(goal, tuple(trials), tuple(study.front()) if finished else (), importances, tuple(fixed), study.settings.sampler)
