"""A search space in Hydra's own syntax: ``choice(a,b)``, ``range(1,9)``, ``interval(0,1)``, ``int(…)``, ``tag(log, …)``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, Override, RangeSweep

from esper.errors import UserError

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

LOG = "log"
DIGITS = 4


@dataclass(frozen=True)
class Dimension:
    """One setting that a search chooses: a list of ``choices`` as they would be typed, or numbers from ``low`` to ``high``, both included.

    ``step`` is the distance between two numbers, None for any; ``log`` makes ratios count instead of differences.
    """

    key: str
    choices: tuple[str, ...] = ()
    low: float = 0.0
    high: float = 0.0
    step: float | None = None
    log: bool = False
    whole: bool = False

    @property
    def ends(self) -> list[str]:
        """Values that stand for all: every choice, or both ends."""
        return list(self.choices) or [self.text(self.low), self.text(self.high)]

    def text(self, value: Any) -> str:
        """The value as it would be typed; a number of an interval has four digits, which are enough and easier to read."""
        if self.choices:
            return str(value)
        if self.whole:
            return str(int(value))
        short = float(value)
        if self.step is None and self.high > self.low:
            places = DIGITS - math.ceil(math.log10(self.high - self.low))
            short = float(f"{short:.{DIGITS}g}") if self.log else round(short, max(0, places))
        return repr(min(max(short, self.low), self.high))

    def distribution(self) -> BaseDistribution:
        """The same for Optuna."""
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        if self.choices:
            return CategoricalDistribution(self.choices)
        if self.whole:
            return IntDistribution(int(self.low), int(self.high), log=self.log, step=int(self.step or 1))
        return FloatDistribution(self.low, self.high, log=self.log, step=self.step)


@dataclass(frozen=True)
class Space:
    """The settings that a search chooses."""

    dimensions: tuple[Dimension, ...]

    def distributions(self) -> dict[str, BaseDistribution]:
        """Optuna's distributions by key."""
        return {one.key: one.distribution() for one in self.dimensions}

    def texts(self, values: Mapping[str, Any]) -> dict[str, str]:
        """Drawn values by key, as they would be typed."""
        return {one.key: one.text(values[one.key]) for one in self.dimensions}


def dimension(override: Override) -> Dimension:
    """The dimension that an override with several values stands for.

    Raises:
        UserError: an empty range, or a logarithm of what is not positive.
    """
    key, value = override.get_key_element(), override.value()
    if isinstance(value, IntervalSweep):
        low, high = value.start, value.end
        assert low is not None and high is not None
        whole = isinstance(low, int) and isinstance(high, int)
        return _checked(override, Dimension(key, (), low, high, None, LOG in value.tags, whole))
    if isinstance(value, RangeSweep):
        numbers = list(override.sweep_iterator())
        if not numbers:
            raise UserError(f"{override.input_line} is empty: a range ends before its second number.")
        low, high = sorted((_number(numbers[0]), _number(numbers[-1])))
        whole, log = all(isinstance(one, int) for one in numbers), LOG in value.tags
        step = abs(_number(value.step)) if value.step is not None else 1.0
        if log and (step != 1 or not whole):
            raise UserError(f"{override.input_line}: a logarithmic range has whole numbers and no step; use tag(log, interval(…)).")
        return _checked(override, Dimension(key, (), low, high, None if log else step, log, whole))
    if isinstance(value, ChoiceSweep) and LOG in value.tags:
        raise UserError(f"{override.input_line}: a choice has no order, so log means nothing; use tag(log, interval(…)).")
    return Dimension(key, tuple(dict.fromkeys(override.sweep_string_iterator())))


def _number(value: Any) -> float:
    assert isinstance(value, int | float)
    return value


def _checked(override: Override, found: Dimension) -> Dimension:
    if not (math.isfinite(found.low) and math.isfinite(found.high) and found.low <= found.high):
        raise UserError(f"{override.input_line} is not accepted: the first number must not be larger than the second.")
    if found.log and found.low <= 0:
        raise UserError(f"{override.input_line} is not accepted: a logarithmic interval begins above 0.")
    return found


def shown(values: Mapping[str, str]) -> str:
    """Values as they are told, ``optimizer.lr=0.003162 model.width=64``."""
    return " ".join(f"{key.lstrip('+')}={text}" for key, text in values.items())


def words(values: Mapping[str, str]) -> list[str]:
    """Values as overrides."""
    return [f"{key}={text}" for key, text in values.items()]


def examples(override: Override) -> Sequence[str]:
    """Values with which a job of a search can be composed, to check all of them: every choice, or both ends."""
    return dimension(override).ends
