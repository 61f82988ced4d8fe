"""Optuna's study behind ask and tell, kept in a file: what it proposes depends on the seed and the trials so far, on nothing else."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from esper.compare.statistics.random_draws import generator
from esper.errors import UserError
from esper.search.config import SearchConfig
from esper.search.space import Space

if TYPE_CHECKING:
    from optuna.pruners import BasePruner
    from optuna.samplers import BaseSampler
    from optuna.trial import FrozenTrial

FILE, NAME = "study.journal", "search"
SPACE = "space"


@dataclass(frozen=True)
class Proposal:
    """A trial that the study asks for: its number, and the values to try by key, as they would be typed."""

    number: int
    values: dict[str, str]


class Study:
    """Proposes trials and learns from how they end. May be used by several threads.

    Args:
        space: the settings that are chosen.
        directions: ``max`` or ``min`` of every objective.
        path: the file that keeps the study (Optuna's journal), None for one in memory.

    Raises:
        UserError: the file holds a study of another space.
    """

    def __init__(self, space: Space, settings: SearchConfig, directions: Sequence[str], path: Path | None = None) -> None:
        import optuna
        from optuna.storages import InMemoryStorage, JournalStorage
        from optuna.storages.journal import JournalFileBackend

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        logging.getLogger("optuna").propagate = False
        self.space, self.settings, self.directions = space, settings, list(directions)
        self._lock = threading.RLock()
        if path is None:
            self._storage: Any = InMemoryStorage()
        else:
            path.with_name(f"{path.name}.lock").unlink(missing_ok=True)  # of a process that was killed: the sweep's lock keeps others out
            self._storage = JournalStorage(JournalFileBackend(str(path)))
        wanted: list[Literal["maximize", "minimize"]] = ["maximize" if one == "max" else "minimize" for one in directions]
        self._study = optuna.create_study(study_name=NAME, storage=self._storage, directions=wanted, load_if_exists=True)
        self._pruner = _pruner(settings) if len(directions) == 1 else None
        self._check(wanted)

    def _check(self, wanted: Sequence[str]) -> None:
        """Refuse to go on with a study of other settings, which the trials so far would mislead."""
        described = {SPACE: sorted(repr(one) for one in self.space.dimensions), "directions": list(wanted)}
        known = dict(self._study.user_attrs)
        if not known:
            for key, value in described.items():
                self._study.set_user_attr(key, value)
        elif known != described:
            raise UserError(
                "The search in this folder has another search space or other objectives, and its trials would mislead this one; "
                "give the same settings, or another folder: hydra.sweep.dir=…."
            )

    @property
    def trials(self) -> list[FrozenTrial]:
        """All trials so far, in their order."""
        with self._lock:
            return list(self._study.get_trials(deepcopy=False))

    def unfinished(self) -> list[Proposal]:
        """Trials that an earlier process began and that have not ended."""
        return [Proposal(one.number, self.space.texts(one.params)) for one in self.trials if not one.state.is_finished()]

    def ask(self) -> Proposal:
        """The next trial."""
        with self._lock:
            number = len(self.trials)
            self._study.sampler = _sampler(self.settings, number)  # so that a resumed search draws what it would have drawn
            trial = self._study.ask(self.space.distributions())
            return Proposal(trial.number, self.space.texts(trial.params))

    def suggest(self, values: Mapping[str, Any]) -> None:
        """Let the next proposal have these values."""
        with self._lock:
            self._study.enqueue_trial(dict(values))

    def report(self, number: int, step: int, value: float) -> bool:
        """Note a trial's metric after so many steps; whether it should end, because it has fallen behind."""
        if self._pruner is None or not math.isfinite(value):
            return False
        with self._lock:
            key = self.trials[number]._trial_id
            self._storage.set_trial_intermediate_value(key, step, value)
            return self._pruner.prune(self._study, self._storage.get_trial(key))

    def finish(self, number: int, values: Sequence[float]) -> None:
        """The trial has come to its end with these values of the objectives; one that is no number has failed."""
        from optuna.trial import TrialState

        with self._lock:
            if all(map(math.isfinite, values)):
                self._study.tell(number, list(values))
            else:
                self._study.tell(number, state=TrialState.FAIL)

    def fail(self, number: int) -> None:
        """The trial broke."""
        self.finish(number, [math.nan] * len(self.directions))

    def prune(self, number: int) -> None:
        """The trial was ended early."""
        from optuna.trial import TrialState

        with self._lock:
            self._study.tell(number, state=TrialState.PRUNED)

    def note(self, number: int, told: Mapping[str, Any]) -> None:
        """Keep numbers with a trial that are no objective, so that they are there when the search goes on."""
        with self._lock:
            for key, value in told.items():
                self._storage.set_trial_user_attr(self.trials[number]._trial_id, key, value)

    def front(self) -> list[int]:
        """Numbers of the trials that no other is better than in everything; the best one where there is one objective."""
        with self._lock:
            return sorted(one.number for one in self._study.best_trials)

    def importances(self) -> dict[str, float]:
        """The share of every setting in the spread of the first objective (fANOVA), largest first; empty for too few trials."""
        from optuna.importance import FanovaImportanceEvaluator, get_param_importances
        from optuna.trial import TrialState

        done = [one for one in self.trials if one.state == TrialState.COMPLETE and one.values]
        if len(done) < 10 or len(self.space.dimensions) < 2 or len({one.values[0] for one in done}) < 2:
            return {}
        found = get_param_importances(self._study, evaluator=FanovaImportanceEvaluator(seed=0), target=lambda one: one.values[0])
        return {key: float(value) for key, value in found.items()}


def _seed(settings: SearchConfig, number: int) -> int:
    return int(generator(f"search {number}", settings.seed).integers(2**32))


def _sampler(settings: SearchConfig, number: int) -> BaseSampler:
    import warnings

    from optuna import samplers
    from optuna.exceptions import ExperimentalWarning

    seed = _seed(settings, number)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        if settings.sampler == "random" or (settings.sampler != "nsga2" and number < settings.startup):
            return samplers.RandomSampler(seed=seed)
        if settings.sampler == "nsga2":
            return samplers.NSGAIISampler(seed=seed, population_size=max(2, settings.startup))
        return samplers.TPESampler(seed=seed, n_startup_trials=settings.startup, multivariate=True)


def _pruner(settings: SearchConfig) -> BasePruner | None:
    from optuna import pruners

    if settings.pruner == "median":
        return pruners.MedianPruner(n_startup_trials=settings.prune_trials, n_warmup_steps=0)
    return pruners.SuccessiveHalvingPruner() if settings.pruner == "halving" else None


def best_first(quality: Sequence[float], sign: float) -> list[int]:
    """Positions from best to worst; what is no number comes last."""
    values = np.array([sign * value if math.isfinite(value) else -math.inf for value in quality])
    return [int(at) for at in np.argsort(-values, kind="stable")]


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Positions of the points (quality, larger is better; cost, smaller is better) that no other beats in both, by rising cost."""
    found: list[int] = []
    best = -math.inf
    for at in sorted(range(len(points)), key=lambda i: (points[i][1], -points[i][0])):
        if points[at][0] > best:
            best = points[at][0]
            found.append(at)
    return found
