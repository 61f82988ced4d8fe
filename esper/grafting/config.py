"""Settings of the grafting strategies (config group ``grafting``)."""

from __future__ import annotations

from dataclasses import dataclass

from esper.errors import UserError
from esper.setting_fields import setting


@dataclass
class GraftingConfig:
    """The settings of every strategy: the length of the ramp and the range of alpha."""

    name: str = ""
    ramp: str = setting("5%", unit="duration", help="ticks from alpha_min to alpha_max, undisturbed")
    alpha_min: float = setting(0.0, low=0.0, high=1.0, help="alpha at the start of the ramp")
    alpha_max: float = setting(1.0, low=0.0, high=1.0, help="alpha at the end of the ramp")

    def __post_init__(self) -> None:
        """Refuse an empty range.

        Raises:
            UserError: ``alpha_min`` is above ``alpha_max``.
        """
        if self.alpha_min > self.alpha_max:
            raise UserError(
                f"grafting.alpha_min={self.alpha_min} is above grafting.alpha_max={self.alpha_max}; "
                "alpha climbs from the first to the second, so give alpha_min <= alpha_max."
            )


@dataclass
class HoldingConfig(GraftingConfig):
    """A strategy that may go slower than ``linear``."""

    max_hold: float = setting(1.0, low=0.0, high=10.0, unit="ramps", help="ramp that holding may cost in all; then alpha climbs regardless")


@dataclass
class LinearConfig(GraftingConfig):
    """alpha = t / ramp."""

    name: str = "linear"


@dataclass
class DriftConfig(HoldingConfig):
    """Holds alpha while the branch's weights move fast."""

    name: str = "drift"
    threshold: float = setting(0.1, low=0.0, help="relative distance of the weights from their average that holds")
    pause: float = setting(0.1, low=0.0, high=1.0, unit="ramps", help="length of one hold; at least one tick")


@dataclass
class MomentumConfig(HoldingConfig):
    """Speed 1 + v with v <- momentum * v + gain * (rise of the metric)."""

    name: str = "momentum"
    momentum: float = setting(0.9, low=0.0, high=0.999, help="share of the velocity kept at each measurement")
    gain: float = setting(20.0, low=0.0, help="velocity for a rise of the metric by 1")
    max_speed: float = setting(2.0, low=1.0, help="fastest ramp, in units of linear's")


@dataclass
class AdaptiveConfig(HoldingConfig):
    """Picks among the others by the present signals, with hysteresis.

    The others run on their own defaults; ``max_hold`` bounds them together.
    """

    name: str = "adaptive"
    margin: float = setting(0.1, low=0.0, high=2.0, help="how much stronger than the present choice a rival must be")
    patience: int = setting(3, low=1, high=10**12, unit="ticks", help="ticks in a row that the same rival must be stronger")
    score_weight: float = setting(0.25, low=0.0, high=1.0, help="how much past pay counts beside the present signals")
    score_decay: float = setting(0.9, low=0.0, high=1.0, help="weight of a choice's past pay when it is paid again")
    score_scale: float = setting(50.0, low=0.0, help="pay for a counterfactual gain that grew by the whole loss")


@dataclass
class StabilityConfig(HoldingConfig):
    """Half speed while training is unsteady; steps back after ``patience`` such ticks in a row."""

    name: str = "stability"
    max_loss_variance: float = setting(0.25, low=0.0, unit="loss²", help="largest steady variance of the training loss")
    max_metric_variance: float = setting(0.01, low=0.0, unit="metric²", help="largest steady variance of the metric")
    band_low: float = setting(0.1, low=0.0, high=1.0, unit="medians", help="smallest steady gradient norm")
    band_high: float = setting(10.0, low=1.0, unit="medians", help="largest steady gradient norm")
    patience: int = setting(5, low=1, high=10**12, unit="ticks", help="unsteady ticks in a row that lead to a step back")


@dataclass
class GradNormConfig(HoldingConfig):
    """Holds alpha while the gradient norm is outside band_low … band_high times its running median."""

    name: str = "grad_norm"
    band_low: float = setting(0.1, low=0.0, high=1.0, unit="medians", help="smallest gradient norm that does not hold")
    band_high: float = setting(10.0, low=1.0, unit="medians", help="largest gradient norm that does not hold")


@dataclass
class PerformanceConfig(HoldingConfig):
    """Speed 1 + sensitivity * counterfactual / |loss|: follows the counterfactual training loss, branch off against on."""

    name: str = "performance"
    sensitivity: float = setting(50.0, low=0.0, help="added speed for a fall by the whole loss (50: twice at 2 %)")
    max_speed: float = setting(2.0, low=1.0, help="fastest ramp, in units of linear's")


@dataclass
class LearnedConfig(HoldingConfig):
    """The strategy that has paid before, for every seed. The others run on their own defaults."""

    name: str = "learned"
    strategies: list[str] = setting(["linear", "drift", "momentum", "grad_norm"], help="what is chosen from")
    margin: float = setting(0.01, low=0.0, high=1.0, help="how much more another must be expected to pay for a change in mid-graft")
    rent: float = setting(0.02, low=0.0, high=1.0, help="reward that a whole run at alpha 0 costs: gains are shares of the loss")
    noise: float = setting(0.05, low=1e-6, high=10.0, help="standard deviation of a reward that is assumed at first")
    memory: str = setting("", help="what strategies have paid in earlier runs: a .json file, read at the start and added to at the end")

    def __post_init__(self) -> None:
        """Refuse what could not be chosen from.

        Raises:
            UserError: an unknown strategy, ``learned`` itself, none at all, or a memory that is no .json file.
        """
        super().__post_init__()
        others = [name for name in CONFIGS if name != self.name]
        for name in self.strategies:
            if name not in others:
                raise UserError(f"grafting.strategies names '{name}'; there are {', '.join(others)}.")
        if not self.strategies:
            raise UserError(f"grafting.strategies is empty, so nothing could be chosen; there are {', '.join(others)}.")
        if self.memory and not self.memory.endswith(".json"):
            raise UserError(f"grafting.memory={self.memory} is no file that ends in .json; name one.")


CONFIGS: dict[str, type[GraftingConfig]] = {
    "linear": LinearConfig,
    "drift": DriftConfig,
    "momentum": MomentumConfig,
    "adaptive": AdaptiveConfig,
    "stability": StabilityConfig,
    "grad_norm": GradNormConfig,
    "performance": PerformanceConfig,
    "learned": LearnedConfig,
}
