"""What ``esper auto`` is asked for: the budget, its limits, and the settings of every run."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from esper.config import did_you_mean
from esper.errors import UserError
from esper.setting_fields import setting

UNITS = {"s": 1.0, "sec": 1.0, "min": 60.0, "h": 3600.0}
MACS = "macs"
OWN = ("budget", "max_parameters", "gain", "search", "to")

#: What auto decides, so that a word for it would be lost, and why.
DECIDED = {
    "trainer.steps": "the budget decides how long each run lasts",
    "trainer.epochs": "the budget decides how long each run lasts",
    "trainer.control": "the runs of auto are each other's controls",
    "trainer.checkpoint_every": "a search for a size is not resumed, and its runs keep no checkpoints",
    "model.weights": "each growth starts from the best model so far",
    "blueprint": "auto tries every kind of growth that the model bears",
    "controller": "auto decides when something grows",
    "lifecycle": "auto decides how something grows",
    "grafting": "auto decides how something grows",
    "resume": "a search for a size is not resumed; its best model is kept",
    "experiment": "auto is a study of its own",
    "arm": "auto is a study of its own",
}


@dataclass
class AutoConfig:
    """The keys of ``esper auto`` beside the settings of a run."""

    budget: str = setting("", help="what may be spent, as in 10min, 2h, 90s or 1e13macs")
    max_parameters: int = setting(0, low=0, help="most parameters of the model; 0: no limit")
    gain: float = setting(
        0.001, low=0.0, high=1.0, help="smallest improvement on validation, as a share of the best, for which a growth is kept"
    )
    search: float = setting(0.3, low=0.0, high=0.9, unit="share", help="part of the budget that finds the optimizer's settings")
    to: str = setting("", help="folder of everything; empty: one under output")


@dataclass(frozen=True)
class Amount:
    """A budget: so many seconds, or so many multiply-accumulates of training."""

    value: float
    unit: str

    @property
    def shown(self) -> str:
        """As it is told."""
        return f"{self.value:.3g} MACs" if self.unit == MACS else f"{self.value:.0f} s"


def amount(text: str) -> Amount:
    """The budget that a word names.

    Raises:
        UserError: anything else.
    """
    found = re.fullmatch(r"([0-9.]+(?:e[+]?[0-9]+)?)\s*([a-z]+)", text.strip().lower())
    try:
        value = float(found[1]) if found else math.nan
    except ValueError:
        value = math.nan
    if found is None or not math.isfinite(value) or value <= 0 or found[2] not in (*UNITS, MACS):
        raise UserError(f"budget={text or '(empty)'} is not accepted: give a time or MACs of training, as in 10min, 2h, 90s or 1e13macs.")
    return Amount(value, MACS) if found[2] == MACS else Amount(value * UNITS[found[2]], "s")


def sorted_words(words: Sequence[str]) -> tuple[AutoConfig, list[str]]:
    """auto's own settings, and the words for its runs.

    Raises:
        UserError: a word that is neither, or for what auto decides.
    """
    from esper.config import structure

    own: dict[str, object] = {}
    rest: list[str] = []
    for word in words:
        key, equals, text = word.partition("=")
        if key in OWN and equals:
            if key in own:
                raise UserError(f"{key} is given twice; give it once.")
            own[key] = text if key in ("budget", "to") else _number(key, text)
            continue
        for decided, why in DECIDED.items():
            if key.lstrip("+~") == decided or key.lstrip("+~").startswith(f"{decided}."):
                raise UserError(f"{word} is not accepted by esper auto: {why}; leave it out.")
        if _foreign(word):
            raise UserError(
                f"'{word}' is no word of esper auto: it takes {', '.join(f'{one}=…' for one in OWN)} and settings of its runs, as in "
                f"task=digits{did_you_mean(key, OWN)}"
            )
        rest.append(word)
    config = structure(AutoConfig, own, "")
    amount(config.budget)
    return config, rest


def _foreign(word: str) -> bool:
    """Whether a word is no setting of a run, and so meant for auto: an option, a bare word, an unknown first key."""
    from esper.cli import conf

    if word.startswith(("+", "~")):
        return False
    key, equals, _ = word.partition("=")
    return not equals or key.partition(".")[0].partition("/")[0] not in (*conf.groups(), *conf.root_keys(), "hydra")


def _number(key: str, text: str) -> object:
    try:
        value = float(text)
    except ValueError:
        return text
    return int(value) if key == "max_parameters" and value.is_integer() else value
