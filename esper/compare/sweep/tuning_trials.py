"""Tuning by Optuna instead of a grid: for every arm the same number of trials in the same space, each with the same seeds."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from esper.compare.config import CompareConfig
from esper.compare.results.comparison import Values
from esper.compare.sweep.sweep import PreparedJob, TuningJob
from esper.compare.sweep.tuning import first_jobs, keys_of, mean_of, refuse_varied, startup, tuned_by, with_values
from esper.errors import UserError
from esper.search.config import SearchConfig
from esper.search.space import Dimension, Space, dimension
from esper.search.study import Study

Place = tuple[str, str]


def tuning_space(tune: Mapping[str, Any]) -> Space:
    """The space of ``compare.tune``: lists of values, and texts in Hydra's syntax such as ``tag(log,interval(1e-4,1e-1))``.

    Raises:
        UserError: a text that is no such thing.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    found = []
    for key, given in tune.items():
        if isinstance(given, list):
            found.append(Dimension(key, tuple(json.dumps(value) for value in given)))
            continue
        try:
            (override,) = OverridesParser.create().parse_overrides([f"tuned={given}"])
        except HydraException:
            override = None
        if override is None or not override.is_sweep_override():
            raise UserError(f"compare.tune.{key}={given} is not accepted: give a list, or 'interval(a,b)' or 'tag(log,interval(a,b))'.")
        one = dataclasses.replace(dimension(override), key=key)
        found.append(dataclasses.replace(one, choices=tuple(map(json.dumps, override.sweep_iterator()))) if one.choices else one)
    return Space(tuple(found))


class TuningTrials:
    """Gives the jobs of every arm's trials their values, when they begin, and learns from them.

    All arms draw the same first trials, because their samplers have the same seed; from then on each learns from its own. What is
    proposed depends on the results alone, so a sweep that was killed proposes the same again and finds those runs done.

    Raises:
        UserError: a key or value that is not accepted.
    """

    def __init__(self, jobs: Sequence[PreparedJob], compare: CompareConfig, metric: str, direction: str) -> None:
        refuse_varied(jobs)
        self._metric, self._seeds, trials = metric, compare.tune_seeds, compare.tune_trials
        settings = SearchConfig(n_trials=trials, startup=startup(trials))
        self._studies: dict[Place, Study] = {}
        self._values: dict[tuple[Place, int], Values] = {}
        for place, one in first_jobs(jobs).items():
            space = tuning_space(tuned_by(compare, place[0]))
            for at in (0, -1):
                with_values(one.config, _typed(space, {each.key: each.ends[at] for each in space.dimensions}), one.choices)
            self._studies[place] = Study(space, settings, [direction])

    def with_proposal(self, one: PreparedJob) -> PreparedJob:
        """The job with the values of its trial."""
        job = one.job
        assert isinstance(job, TuningJob)
        place = (job.arm, job.block)
        study = self._studies[place]
        while (place, job.trial) not in self._values:
            proposal = study.ask()
            self._values[(place, proposal.number)] = _typed(study.space, proposal.values)
        values = self._values[(place, job.trial)]
        config = with_values(one.config, values, one.choices)
        return dataclasses.replace(one, job=dataclasses.replace(job, values=values), config=config)

    def learn(self, ended: PreparedJob, tuning_jobs: Sequence[PreparedJob]) -> None:
        """Tell the study of the trial that this job, the last of its trial to end, belongs to."""
        job = ended.job
        assert isinstance(job, TuningJob)
        mine = [one for one in tuning_jobs if (one.job.arm, one.job.block) == (job.arm, job.block)]
        mine = [one for one in mine if isinstance(one.job, TuningJob) and one.job.trial == job.trial]
        self._studies[(job.arm, job.block)].finish(job.trial, [mean_of(mine, self._metric)])


def _typed(space: Space, values: Mapping[str, str]) -> Values:
    """Values as the settings take them, one for each key."""
    found: Values = {}
    for one in space.dimensions:
        text = values[one.key]
        value = json.loads(text) if one.choices else int(text) if one.whole else float(text)
        found |= dict.fromkeys(keys_of(one.key), value)
    return found
