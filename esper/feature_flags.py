"""Feature flags: where a feature is on, by site and model, by percentage, by the environment, and until it fails.

Of the rules the first that says something holds: off where it failed too often, off where ``block`` matches, on where ``allow``
matches, else on at ``percent`` of the sites. The environment's ``ESPER_FLAGS`` (``kernels=off,growth=25%``) takes the place of what
a configuration says when it is made, so the run's own record says the same.
"""

from __future__ import annotations

import difflib
import hashlib
import os
from dataclasses import dataclass, field, fields, replace
from fnmatch import fnmatchcase
from typing import Any, ClassVar

from esper.errors import UserError
from esper.setting_fields import setting

VARIABLE = "ESPER_FLAGS"


@dataclass
class Flag:
    """Where one feature is on. Patterns are globs over the names of sites, or over ``model/site``, the model by its class."""

    percent: float = setting(100.0, low=0.0, high=100.0, unit="%", help="share of the sites where it is on, chosen by a stable hash")
    allow: list[str] = setting([], help="sites where it is on whatever percent says, as in fc1, blocks.*, cnn/*")
    block: list[str] = setting([], help="sites where it is off whatever else is said")
    failures: int = setting(1, low=0, help="failures after which it is off to the end of the run; 0: never")

    everywhere: ClassVar[bool] = False
    """Whether failures of all sites count together and turn it off at all of them."""


@dataclass
class KernelFlag(Flag):
    """The Triton kernels, where ``kernel`` takes them; a failure is a canary's mismatch or an exception of a kernel's forward pass."""

    everywhere: ClassVar[bool] = True


@dataclass
class GrowthFlag(Flag):
    """Whether a seed may germinate, or a branch be replaced; a failure is a branch that goes for exceptions or non-finite values."""

    failures: int = setting(3, low=0, help="failures at a site after which it is off there to the end of the run; 0: never")


@dataclass
class FlagsConfig:
    """The features that can be turned on and off at places."""

    name: str = "default"
    kernels: KernelFlag = field(default_factory=KernelFlag)
    growth: GrowthFlag = field(default_factory=GrowthFlag)

    def __post_init__(self) -> None:
        """Let the environment have its say. Raises UserError where that says nothing that can be meant."""
        for name, value in environment().items():
            before = getattr(self, name)
            setattr(self, name, replace(before, percent=value, allow=[] if value == 0.0 else before.allow))


CONFIGS: dict[str, type] = {"default": FlagsConfig}
FEATURES = tuple(one.name for one in fields(FlagsConfig) if one.name != "name")


def environment() -> dict[str, float]:
    """Feature -> percent, as ``ESPER_FLAGS`` says. Raises UserError for a feature that there is not, or a value that is none."""
    said: dict[str, float] = {}
    for part in filter(None, (part.strip() for part in os.environ.get(VARIABLE, "").split(","))):
        name, _, value = (text.strip() for text in part.partition("="))
        if name not in FEATURES:
            close = difflib.get_close_matches(name, FEATURES, n=1)
            near = f"; did you mean {close[0]}?" if close else "."
            raise UserError(f"{VARIABLE} says '{part}', and there is no feature '{name}': there are {' and '.join(FEATURES)}{near}")
        said[name] = _percent(part, value)
    return said


def _percent(part: str, value: str) -> float:
    words = {"on": 100.0, "off": 0.0}
    try:
        percent = words[value] if value in words else float(value.removesuffix("%")) if value.endswith("%") else -1.0
    except ValueError:
        percent = -1.0
    if not 0.0 <= percent <= 100.0:
        raise UserError(f"{VARIABLE} says '{part}'; a feature is on, off, or on at a share of the sites, as in growth=25%.")
    return percent


def chosen_by_hash(feature: str, name: str, fraction: float) -> bool:
    """Stable choice of a fraction of names, by SHA-256; every feature has its own cohort, and a larger fraction contains a smaller."""
    digest = hashlib.sha256(f"{feature}\0{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


@dataclass(frozen=True)
class Verdict:
    """Whether a feature is on at a site, and why in words."""

    on: bool
    why: str


class Flags:
    """The flags of one run: a config, the name of the model's class, and the failures so far."""

    def __init__(self, config: FlagsConfig | None = None, model: str = "") -> None:
        self.config = FlagsConfig() if config is None else config
        self.model = model
        self.failed: dict[str, dict[str, int]] = {}
        self._known: dict[tuple[str, str], Verdict] = {}

    def on(self, feature: str, site: str) -> bool:
        """Whether the feature is on at a site."""
        return self.verdict(feature, site).on

    def verdict(self, feature: str, site: str) -> Verdict:
        """The same with the reason."""
        key = feature, site
        if key not in self._known:
            self._known[key] = self._decide(feature, site)
        return self._known[key]

    def _decide(self, feature: str, site: str) -> Verdict:
        flag: Flag = getattr(self.config, feature)
        failed, name = self._failures(flag, feature, site), f"flags.{feature}"
        if flag.failures and failed >= flag.failures:
            return Verdict(False, f"it failed {failed} time{'s' if failed > 1 else ''}, and {name}.failures={flag.failures}")
        for lists, on in ((flag.block, False), (flag.allow, True)):
            for pattern in lists:
                if self._matches(pattern, site):
                    return Verdict(on, f"{name}.{'allow' if on else 'block'} names {pattern}")
        on = chosen_by_hash(feature, site, flag.percent / 100.0)
        said = f"{VARIABLE} sets " if feature in environment() else ""
        return Verdict(on, f"{said}{name}.percent={flag.percent:g}")

    def _failures(self, flag: Flag, feature: str, site: str) -> int:
        counts = self.failed.get(feature, {})
        return sum(counts.values()) if flag.everywhere else counts.get(site, 0)

    def _matches(self, pattern: str, site: str) -> bool:
        model, slash, name = pattern.rpartition("/")
        return fnmatchcase(site, name) and (not slash or fnmatchcase(self.model.lower(), model.lower()))

    def fail(self, feature: str, site: str) -> bool:
        """Count a failure of a feature at a site; whether it is this one that turned it off."""
        was = self.on(feature, site)
        counts = self.failed.setdefault(feature, {})
        counts[site] = counts.get(site, 0) + 1
        self._known.clear()
        return was and not self.on(feature, site)

    def refuse_unmatched(self, sites: list[str]) -> None:
        """Raise UserError for a pattern that means this model and matches none of its sites."""
        for feature in FEATURES:
            for kind in ("allow", "block"):
                for pattern in getattr(getattr(self.config, feature), kind):
                    model, slash, name = pattern.rpartition("/")
                    meant = not slash or fnmatchcase(self.model.lower(), model.lower())
                    if meant and not any(fnmatchcase(site, name) for site in sites):
                        raise UserError(
                            f"flags.{feature}.{kind}=[{pattern}] matches no site of the {self.model}; there are {', '.join(sites)}. "
                            "A pattern for the sites of one model alone is written <model>/<site>."
                        )

    def state(self) -> dict[str, Any]:
        """The failures, as plain values."""
        return {feature: dict(counts) for feature, counts in self.failed.items()}

    def load(self, state: dict[str, Any]) -> None:
        """Take over a saved state."""
        self.failed = {feature: {str(site): int(n) for site, n in counts.items()} for feature, counts in state.items()}
        self._known.clear()
