"""The plan of a sweep, saved before its first run: the arms, the metric, the margin and the error rate."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from esper.compare.config import CompareConfig
from esper.compare.statistics.group_power import detectable_by_groups, fewest_runs, needed_runs
from esper.compare.statistics.permutation import finest_group_level
from esper.compare.statistics.power import MOST_PAIRS, PILOT_PAIRS, detectable, fewest_pairs, needed_pairs
from esper.compare.statistics.random_draws import centred
from esper.compare.statistics.sequential import look_pairs
from esper.compare.statistics.sign_flip import finest_level
from esper.config import listing
from esper.errors import UserError

FILE = "plan.json"
ASSUMED = (1, 2, 5)  # multiples of the minimum effect that the spread might be
POOLINGS = ("both", "apart", "pooled")


@dataclass(frozen=True)
class Plan:
    """Everything that the verdict depends on besides the runs. A later change of it makes the analysis exploratory.

    ``arms`` maps each arm's readable name to the settings that make it; ``blocks`` are the names of the blocks;
    ``noise`` holds a pilot's paired differences around their means, from which power is stated. ``about`` has for every block
    its ``task``, its ``model`` and the ``samples`` of its test set, as far as all its jobs share them. Where the arms are not
    ``paired``, ``seeds`` number the runs of an arm. ``pooling`` says whether blocks are judged apart, pooled or both. ``against`` names
    for some arms another one that they are compared with in place of the ``reference``.
    """

    metric: str
    direction: str
    minimum_effect: float
    alpha: float
    power: float
    spread: float
    reference: str
    arms: dict[str, dict[str, Any]]
    seeds: tuple[int | str, ...]
    blocks: tuple[str, ...] = ("",)
    sequential: bool = False
    looks: int = 3
    ranking: bool = False
    tune: dict[str, Any] = field(default_factory=dict)
    tune_seeds: int = 0
    tune_trials: int = 0
    noise: tuple[float, ...] = ()
    about: dict[str, dict[str, Any]] = field(default_factory=dict)
    paired: bool = True
    pooling: str = "both"
    against: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.arms) < 2:
            given = ", ".join(self.arms) or "none"
            raise UserError(
                f"A comparison needs at least two arms, the sweep has {given}; let something besides the seed vary, e.g. arm=a,b."
            )
        if self.reference not in self.arms:
            raise UserError(f"compare.reference={self.reference!r} is no arm of this sweep; the arms are {', '.join(self.arms)}.")
        for arm, other in self.against.items():
            if not {arm, other} <= self.arms.keys() or arm in (other, self.reference):
                raise UserError(
                    f"compare.against={{{arm}: {other}}} is not accepted: give two arms of this sweep, the first not the reference; "
                    f"the arms are {', '.join(self.arms)}."
                )
        if self.direction not in ("max", "min"):
            raise UserError(f"The direction of {self.metric!r} is {self.direction!r}; set compare.direction to max or min.")
        for key, values in self.tune.items():
            if isinstance(values, str) and self.tune_trials:
                continue
            if isinstance(values, str) and "interval(" in values:
                raise UserError(f"compare.tune.{key}={values} is an interval, which no grid has: add compare.tune_trials=<how many>.")
            if not isinstance(values, list) or not values:
                raise UserError(f"compare.tune.{key}={values} is not accepted: give a list of values, as in {key}: [0.001, 0.003].")
        if len(set(self.seeds)) < len(self.seeds) or not self.seeds:
            raise UserError(f"Seeds pair the arms, so each must be given once; got {list(self.seeds)}.")
        if self.pooling not in POOLINGS:
            raise UserError(f"pooling={self.pooling} is not accepted: it takes {listing(POOLINGS)}.")
        if self.sequential and not self.paired:
            raise UserError("Looking early needs pairs: name what pairs the runs (pair=…), or leave sequential out.")
        self._refuse_too_fine()

    def _refuse_too_fine(self) -> None:
        pairs, arms = len(self.seeds), len(self.arms)
        most = max(self.comparisons, arms * (arms - 1) // 2 if self.ranking else 1)
        finest, words = (finest_level(pairs), "sign patterns of {} pairs") if self.paired else (self._finest_groups, "divisions of {} runs")
        if self.alpha / most < finest:
            raise UserError(
                f"compare.alpha={self.alpha:g} over {most} comparisons asks for p-values below {self.alpha / most:.1g}, and the random "
                f"{words.format(pairs)} decide at {finest:.1g} at the finest; raise alpha or compare fewer arms."
            )

    @property
    def _finest_groups(self) -> float:
        return finest_group_level(((len(self.seeds), len(self.seeds)),))

    @property
    def apart(self) -> bool:
        """Whether every block gets its own verdict."""
        return len(self.blocks) == 1 or self.pooling != "pooled"

    @property
    def pools(self) -> bool:
        """Whether there is a verdict over all blocks."""
        return len(self.blocks) > 1 and self.pooling != "apart"

    @property
    def comparisons(self) -> int:
        """How many verdicts Holm corrects for: (arms − 1) for every block, and once more for the pooled ones."""
        return (len(self.arms) - 1) * (len(self.blocks) * self.apart + self.pools)

    @property
    def couples(self) -> list[tuple[str, str]]:
        """Every arm but the reference, each with the arm that it is compared with."""
        return [(arm, self.against.get(arm, self.reference)) for arm in self.arms if arm != self.reference]

    @property
    def others(self) -> str:
        """What the arms are compared with, in words."""
        return f"{self.reference}, or the arm named" if self.against else self.reference

    @property
    def sign(self) -> float:
        """+1 where larger values of the metric are better, −1 where smaller ones are."""
        return 1.0 if self.direction == "max" else -1.0

    def samples(self, block: str) -> int:
        """Size of the block's test set; 0 where it is not known, or not the same for all jobs."""
        return int(self.about.get(block, {}).get("samples", 0))

    @property
    def early(self) -> int:
        """How often a sequential sweep looks; 0 for one that is judged at its end alone."""
        return self.looks if self.sequential else 0

    def text(self) -> str:
        """The plan as JSON, arms in their order."""
        return json.dumps(dataclasses.asdict(self), indent=2)

    @property
    def fewest(self) -> int:
        """Pairs, or runs of each arm, below which no difference can be shown."""
        if self.paired:
            return fewest_pairs(self.alpha, self.comparisons)
        return fewest_runs(self.alpha, self.comparisons, 1 if self.apart else len(self.blocks))

    @property
    def unit(self) -> str:
        """What is counted: pairs, or runs of each arm."""
        return "pairs" if self.paired else "runs of each arm"

    @property
    def noise_of(self) -> str:
        """What the spread is the standard deviation of."""
        return "the paired differences" if self.paired else "the runs of an arm"

    def statement(self) -> list[str]:
        """The differences that these pairs can show, in sentences, before they are spent."""
        pairs, fewest, others = len(self.seeds), self.fewest, len(self.arms) - 1
        named = "".join(f", {arm} against {other}" for arm, other in self.against.items())
        lines = [
            f"{self.metric} ({self.direction}), {others} arm{'s' * (others > 1)} against {self.reference}{named}, {pairs} {self.unit}, "
            f"{self.comparisons} comparison{'s' * (self.comparisons > 1)} at α = {self.alpha:g} after Holm; "
            f"worth having: {self.minimum_effect:g}."
        ]
        if pairs < fewest:
            words = f"Too few {self.unit}: below {fewest} no difference, however clear, can reach α; none can be detected"
            lines.append(f"{words} with {pairs}.")
        else:
            looked = f", looked at after {listing(map(str, look_pairs(pairs, self.looks, fewest)))}," if self.sequential else ""
            lines.append(self._found(pairs, looked))
        return [*lines, *(self._needed(pairs) if self.spread > 0 else self._assumed(pairs, fewest))]

    def _found(self, pairs: int, looked: str) -> str:
        """The difference that so many pairs find, in the metric where the spread of its differences is known."""
        effect = self._detectable(pairs)
        size = f"{effect:.2f} standard deviations of {self.noise_of}"
        if self.spread > 0:
            size = f"{effect * self.spread:.3g} ({effect:.2f} × {self.spread:.3g}, the expected standard deviation of {self.noise_of})"
        shape = f"as the {len(self.noise)} of the pilot are spread" if self.noise else "if these are normal"
        return f"{pairs} {self.unit}{looked} find a difference of {size} with {self.power:.0%} power, {shape}."

    def _needed(self, pairs: int) -> list[str]:
        """How many pairs the minimum effect needs at the spread that is known."""
        if self.minimum_effect <= 0:
            return []
        needed = self._pairs_for(self.spread)
        verdict = ", so this sweep has too few" if needed > pairs else ""
        return [f"A difference of {self.minimum_effect:g} needs {pair_count(needed)} {self.unit}{verdict}."]

    def _assumed(self, pairs: int, fewest: int) -> list[str]:
        """The same for several spreads, where none is known: the minimum effect and multiples of it."""
        if self.minimum_effect <= 0:
            return []
        words = f"depends on the standard deviation of {self.noise_of}, which is not known"
        lines = [f"How many {self.unit} a difference of {self.minimum_effect:g} needs {words}:"]
        for spread in (times * self.minimum_effect for times in ASSUMED):
            found = f"; {pairs} find {self._detectable(pairs) * spread:.2g}" if pairs >= fewest else ""
            lines.append(f"  if it is {spread:g}: {pair_count(self._pairs_for(spread))} {self.unit}{found}")
        return lines

    def _detectable(self, pairs: int) -> float:
        if not self.paired:
            return detectable_by_groups(pairs, self.power, self.alpha, self.comparisons)
        return detectable(pairs, self.power, self.alpha, self.comparisons, self.noise, self.early)

    def _pairs_for(self, spread: float) -> int:
        if not self.paired:
            return needed_runs(self.minimum_effect / spread, self.power, self.alpha, self.comparisons)
        return needed_pairs(self.minimum_effect / spread, self.power, self.alpha, self.comparisons, self.noise, self.early)


def pair_count(pairs: int) -> str:
    """A number of pairs for a sentence, like ``1,024``; beyond a million only that it is more."""
    return f"{pairs:,}" if pairs < MOST_PAIRS else f"more than {MOST_PAIRS:,}"


def make_plan(
    config: CompareConfig,
    *,
    arms: Mapping[str, dict[str, Any]],
    seeds: Sequence[int | str],
    blocks: Sequence[str],
    metric: str,
    direction: str,
    about: Mapping[str, dict[str, Any]] | None = None,
    paired: bool = True,
) -> Plan:
    """The plan of a sweep; ``metric`` and ``direction`` are the task's, used where the config leaves them open."""
    noise = pilot_noise(Path(config.pilot)) if config.pilot else ()
    return Plan(
        metric=config.metric or metric,
        direction=direction if config.direction == "auto" else config.direction,
        minimum_effect=config.minimum_effect,
        alpha=config.alpha,
        power=config.power,
        spread=config.spread or (float(np.std(noise)) if noise else 0.0),
        reference=config.reference or next(iter(arms), ""),
        arms={name: dict(values) for name, values in arms.items()},
        seeds=tuple(seeds),
        blocks=tuple(blocks) or ("",),
        sequential=config.sequential,
        looks=config.looks,
        ranking=config.ranking,
        tune=dict(config.tune),
        tune_seeds=config.tune_seeds if config.tune else 0,
        tune_trials=config.tune_trials if config.tune else 0,
        noise=noise,
        about=dict(about or {}),
        paired=paired,
        pooling=config.pooling,
        against=dict(config.against),
    )


def pilot_noise(path: Path) -> tuple[float, ...]:
    """The paired differences of an earlier sweep, those of every comparison around their own mean; failed pairs are left out.

    Raises:
        UserError: no ``comparison.json``, or one with too few differences to tell the shape of their noise.
    """
    try:
        judged = json.loads(path.read_text(encoding="utf-8"))["verdicts"]
        points = [np.array([p for p, ok in zip(one["points"], one["finished"], strict=True) if ok]) for one in judged]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"compare.pilot={path} is no comparison.json of a sweep; give the path of one.") from error
    found = tuple(float(value) for one in points if len(one) for value in centred(one))
    if len(found) < PILOT_PAIRS or not any(found):
        raise UserError(f"compare.pilot={path} has {len(found)} paired differences; {PILOT_PAIRS} that are not all equal are the least.")
    return found


def save_plan(plan: Plan, folder: Path) -> None:
    """Write the plan beside the sweep, once: an existing plan is never replaced.

    Raises:
        UserError: the folder holds another plan (two sweeps with one name, or a plan changed between two starts).
    """
    path = folder / FILE
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(plan.text())
        return
    changed = changes(load_plan(path), plan)
    if changed:
        raise UserError(
            f"{folder} already holds a sweep with another plan ({', '.join(changed)} differ{'s' * (len(changed) == 1)}); "
            "give this sweep a folder of its own: hydra.sweep.dir=…."
        )


def saved_text(folder: Path) -> str:
    """The plan of the sweep in ``folder`` as its first start wrote it; empty where it has none."""
    path = folder / FILE
    return path.read_text() if path.exists() else ""


def load_plan(path: Path) -> Plan:
    """The plan in this file."""
    return parse_plan(path.read_text())


def parse_plan(text: str) -> Plan:
    """The plan that :meth:`Plan.text` wrote."""
    values = json.loads(text)
    lists = {key: tuple(values[key]) for key in ("seeds", "blocks", "noise") if key in values}
    return Plan(**{**values, **lists})


def changes(planned: Plan, used: Plan) -> list[str]:
    """Names of the fields in which the analysis differs from the plan; empty: confirmatory.

    ``ranking`` only adds a table; ``spread`` and ``noise`` only inform the power statement, and ``about`` names things: they are free.
    """
    free = ("ranking", "spread", "noise", "about")
    names = [f.name for f in dataclasses.fields(Plan) if f.name not in free]
    return [name for name in names if getattr(planned, name) != getattr(used, name)]
