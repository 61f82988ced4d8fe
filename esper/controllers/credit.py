"""Credit for what grew: the counterfactual gain at the end of a seed's life, for its cost, less rent for time at small alpha.

A controller games what it is rewarded for, so the gain counts only as far as nothing else explains it. For a branch that is kept it is

    g = G / (loss + G),  G = min(off − on, began − on − trend · own)        (G / loss where G < 0)

``off − on`` is the judge's bound at the last look. ``began − on`` (gate ``no_harm``) is how far the loss has fallen since the blending
began, which a host that merely leans on a useless branch does not show. ``own`` is the fall that the host would have learnt meanwhile
by itself, extrapolated from the time before the blending. As a share of the loss that there would be without it, a gain from an immature
host (an early fossil) counts no more than a late one, and branches that lean on each other, each of which the judge finds worth more than
the whole loss, are still told apart. A branch that was culled or cancelled has gained nothing; one that was rolled back has done harm, for
which ``min(0, off − on) / loss`` stands; one that is unfinished when the run ends has gained nothing. The reward is

    g / cost − rent · ∫(1 − α) dt / T        (without the division where g < 0)

and the cost is the mean of parameters and MACs, each in units of the mean branch that could grow in this run.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from esper.bus.telemetry_codec import unpack
from esper.controllers.view import LOST, Seed
from esper.lifecycle.stages import Stage
from esper.messages import GateResult, Message, Metrics, RunStarted, Telemetry, Transition

LEAST_COST = 0.05
"""Mean branches that the cheapest branch counts as, so that a nearly free one with a tiny gain does not outbid everything."""


@dataclass
class Life:
    """A branch from germination to its end; ``squat`` is ``∫(1 − α) dt`` [ticks] up to tick ``since``, at which α was ``alpha``."""

    site: str
    seed: int
    born: int
    blueprint: str
    why: dict[str, Any] = field(default_factory=dict)
    alpha: float = 0.0
    since: int = 0
    squat: float = 0.0
    blending: int = -1
    gain: float = math.nan
    fall: float = math.nan

    def pass_time(self, tick: int, alpha: float | None = None) -> None:
        """Charge the time up to ``tick`` at the alpha known so far."""
        self.squat += max(0, tick - self.since) * (1.0 - self.alpha)
        self.since = max(self.since, tick)
        self.alpha = self.alpha if alpha is None else alpha


@dataclass(frozen=True)
class Ended:
    """The end of a life: its gain ``g``, its cost in mean branches, its time at small alpha as a share of the run, and the reward."""

    life: Life
    kept: bool
    gain: float
    cost: float
    squat: float
    reward: float


class OwnLearning:
    """The values of a held-out loss, from which the host's own learning is extrapolated: its fall decays by a constant factor a window."""

    def __init__(self) -> None:
        self.values: list[tuple[int, float]] = []

    def observe(self, tick: int, value: float) -> None:
        """A measurement."""
        if math.isfinite(value):
            self.values.append((tick, value))

    def last(self) -> float:
        """The latest value; NaN before the first."""
        return self.values[-1][1] if self.values else math.nan

    def fall(self, begin: int, end: int) -> float:
        """The fall expected between two ticks, from the values up to ``begin`` alone (Aitken: ``f·ρ(1−ρⁿ)/(1−ρ)``); 0 where unknown.

        A loss that was never below 0 falls no further than there: a host whose loss has just begun to fall steeply promises no more.
        """
        known = [(tick, value) for tick, value in self.values if tick <= begin]
        if len(known) < 3 or end <= begin:
            return 0.0
        ticks, values = (np.array(column, float) for column in zip(*known, strict=True))
        window = (ticks[-1] - ticks[0]) / 2.0
        earlier, middle, latest = np.interp([ticks[0], ticks[0] + window, ticks[-1]], ticks, values)
        before, recent = earlier - middle, middle - latest
        if before <= 0.0 or recent <= 0.0:
            return 0.0
        decay = min(recent / before, 0.9)
        expected = float(recent * decay * (1.0 - decay ** ((end - begin) / window)) / (1.0 - decay))
        return min(expected, float(latest)) if values.min() >= 0.0 else expected


class Credit:
    """Follows the lives of all branches of a run; ``observe`` returns the life that a message ended."""

    def __init__(self, metric: str, rent: float, trend: float) -> None:
        self.metric, self.rent, self.trend = metric, rent, trend
        self.learning = OwnLearning()
        self.lives: dict[Seed, Life] = {}
        self._sites: dict[str, dict[str, Any]] = {}
        self._means = (1.0, 1.0)
        self._total = 1

    def observe(self, message: Message) -> Ended | None:
        """Take note of a message; returns the life that ended by it."""
        match message:
            case RunStarted():
                self._total = max(1, message.total_ticks)
                self._sites = {site["name"]: site for site in message.sites}
                adds = [adds for site in message.sites for adds in site["blueprints"].values()]
                parameters, macs = (max(1e-9, float(np.mean([one[key] for one in adds] or [1]))) for key in ("parameters", "macs"))
                self._means = parameters, macs
            case Metrics() if self.metric in message.values:
                self.learning.observe(message.tick, message.values[self.metric])
            case GateResult():
                self._gate(message)
            case Telemetry():
                self._alphas(message)
            case Transition():
                return self._moved(message)
        return None

    def cost(self, site: str, blueprint: str) -> float:
        """Parameters and MACs of a branch, each in units of the mean branch; at least LEAST_COST."""
        described = self._sites[site]
        adds = described["blueprints"].get(blueprint or described["blueprint"], {"parameters": self._means[0], "macs": self._means[1]})
        return max(LEAST_COST, 0.5 * (float(adds["parameters"]) / self._means[0] + float(adds["macs"]) / self._means[1]))

    def unfinished(self, tick: int) -> list[Ended]:
        """What the living branches would have earned if the run ended at ``tick``: nothing, and their rent."""
        lives = [Life(**asdict(life)) for life in self.lives.values()]
        return [self._end(life, tick, kept=False, gain=0.0) for life in lives]

    def _moved(self, event: Transition) -> Ended | None:
        seed = (event.site, event.seed)
        if event.target == Stage.GERMINATED:
            self.lives[seed] = Life(event.site, event.seed, event.tick, event.blueprint, dict(event.why), since=event.tick)
        elif seed in self.lives:
            life = self.lives[seed]
            if event.target == Stage.GRAFTING:
                life.blending = event.tick
            elif event.target == Stage.FOSSILIZED or event.target in LOST:
                del self.lives[seed]
                kept = event.target == Stage.FOSSILIZED
                gain = self._gain(life, event.tick, kept, harmed=event.target == Stage.ROLLED_BACK)
                return self._end(life, event.tick, kept, gain)
        return None

    def _gain(self, life: Life, tick: int, kept: bool, harmed: bool) -> float:
        """The relative gain ``g`` of an ended life."""
        loss = self.learning.last()
        size = abs(loss) if math.isfinite(loss) and loss != 0.0 else 1.0
        gain = life.gain if math.isfinite(life.gain) else 0.0
        if not kept:
            return max(-1.0, min(0.0, gain) / size) if harmed else 0.0
        began = life.blending if life.blending >= 0 else life.born
        fall = life.fall if math.isfinite(life.fall) else 0.0
        worth = min(gain, fall - self.trend * self.learning.fall(began, tick))
        return max(-1.0, worth / (size + max(0.0, worth)))

    def _end(self, life: Life, tick: int, kept: bool, gain: float) -> Ended:
        life.pass_time(tick)
        cost, squat = self.cost(life.site, life.blueprint), life.squat / self._total
        reward = (gain / cost if gain > 0.0 else gain) - self.rent * squat
        return Ended(life, kept, gain, cost, squat, reward)

    def _gate(self, asked: GateResult) -> None:
        life = self.lives.get((asked.site, asked.seed))
        if life is None:
            return
        if asked.gate in ("gain", "final_gain"):
            life.gain = asked.value
        elif asked.gate == "no_harm":
            life.fall = asked.value

    def _alphas(self, message: Telemetry) -> None:
        lives = [life for life in self.lives.values() if life.site == message.site and life.seed < message.seeds]
        if not lives or "alpha" not in message.columns:
            return
        alphas = unpack(message)[:, :, message.columns.index("alpha")]
        for tick, row in zip(message.ticks, alphas, strict=True):
            for life in lives:
                life.pass_time(tick, float(row[life.seed]))

    def state(self) -> dict[str, Any]:
        """JSON-able; NaN stands as None."""
        lives = [{name: _plain(value) for name, value in asdict(life).items()} for life in self.lives.values()]
        return {"lives": lives, "values": [list(value) for value in self.learning.values]}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from ``state``."""
        self.lives = {}
        for saved in state["lives"]:
            values: dict[str, Any] = {name: math.nan if value is None else value for name, value in saved.items()}
            self.lives[saved["site"], saved["seed"]] = Life(**values)
        self.learning.values = [(int(tick), float(value)) for tick, value in state["values"]]


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and math.isnan(value) else value
