"""``status=failed arm=drift newer=7d``: the words that choose among runs and sweeps."""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from esper.config import did_you_mean, listing
from esper.errors import UserError
from esper.inventory.entries import JOB, KINDS, STATUSES, Entry

UNITS = {"s": 1, "m": 60, "h": 3_600, "d": 86_400, "w": 604_800}
AGE = re.compile(rf"(\d+(?:\.\d+)?)([{''.join(UNITS)}])")
PLACES = ("output", "uri")
KEYS = ("kind", "status", "name", "arm", "metric", "sweep", "newer", "older", "sort", "limit", *PLACES)


def read_words(words: Sequence[str], program: str, keys: Sequence[str] = KEYS) -> dict[str, str]:
    """Values by key.

    Raises:
        UserError: a word that is no ``key=value``, an unknown key, or one that is given twice.
    """
    given: dict[str, str] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or key not in keys:
            raise UserError(f"'{word}' is not accepted: {program} takes {listing(f'{key}=…' for key in keys)}{did_you_mean(key, keys)}")
        if key in given:
            raise UserError(f"{key} is given twice ({given[key]} and {text}); give it once, several values as {key}=a,b.")
        given[key] = text
    return given


def age(text: str, key: str) -> float:
    """``7d`` in seconds.

    Raises:
        UserError: no such text.
    """
    match = AGE.fullmatch(text)
    if not match:
        raise UserError(f"{key}={text} is not accepted: give a number and a unit, as in {key}=7d (s, m, h, d or w).")
    return float(match[1]) * UNITS[match[2]]


def chosen(found: Sequence[Entry], given: Mapping[str, str], now: float) -> list[Entry]:
    """Those of ``found`` that pass every filter in ``given``, in its order; ``now`` is seconds since 1970.

    Jobs of a sweep are left out unless ``kind`` or ``sweep`` asks for them.

    Raises:
        UserError: a value that is not accepted.
    """
    tests = _tests(given, now)
    kept = [entry for entry in found if all(test(entry) for test in tests)]
    kept.sort(key=_order(given.get("sort", "age")))
    limit = given.get("limit", "")
    if limit and not (limit.isdecimal() and int(limit) > 0):
        raise UserError(f"limit={limit} is not accepted: give how many are shown at most, as in limit=20.")
    return kept[: int(limit)] if limit else kept


def _tests(given: Mapping[str, str], now: float) -> list[Callable[[Entry], bool]]:
    tests: list[Callable[[Entry], bool]] = []
    kinds = _words(given.get("kind", ""), "kind", KINDS)
    statuses = _words(given.get("status", "").upper(), "status", STATUSES)
    sweep = given.get("sweep", "")
    if kinds:
        tests.append(lambda entry: entry.kind in kinds)
    elif not sweep:
        tests.append(lambda entry: entry.kind != JOB)
    if statuses:
        tests.append(lambda entry: entry.status in statuses)
    if sweep:
        place = Path(sweep).resolve()
        tests.append(lambda entry: entry.kind == JOB and (entry.sweep == sweep or _within(entry, place)))
    if "name" in given:
        tests.append(lambda entry: _like(entry.name, given["name"]) or _like(entry.id, given["name"]))
    if "arm" in given:
        tests.append(lambda entry: any(_like(arm, given["arm"]) for arm in entry.arms))
    if "metric" in given:
        tests.append(lambda entry: _like(entry.metric, given["metric"]))
    if "newer" in given:
        newest = now - age(given["newer"], "newer")
        tests.append(lambda entry: entry.changed >= newest)
    if "older" in given:
        oldest = now - age(given["older"], "older")
        tests.append(lambda entry: entry.changed <= oldest)
    return tests


def _within(entry: Entry, place: Path) -> bool:
    """Whether an entry's folder is below ``place``."""
    return entry.folder is not None and entry.folder.is_relative_to(place)


def _words(text: str, key: str, known: Sequence[str]) -> list[str]:
    found = [word for word in text.split(",") if word]
    for word in found:
        if word not in known:
            shown = [one.lower() for one in known]
            raise UserError(f"{key}={word.lower()} is not accepted: it takes {listing(shown)}{did_you_mean(word.lower(), shown)}")
    return found


def _like(text: str, pattern: str) -> bool:
    """Whether ``pattern`` is a part of the text, or matches all of it where it has ``*`` or ``?``."""
    if "*" in pattern or "?" in pattern:
        return fnmatch.fnmatchcase(text.lower(), pattern.lower())
    return pattern.lower() in text.lower()


def _order(word: str) -> Callable[[Entry], tuple[bool, float | str]]:
    """The key of ``sort``; what has no value comes last."""
    orders: dict[str, Callable[[Entry], float | str]] = {
        "age": lambda entry: -entry.changed,
        "name": lambda entry: entry.name,
        "status": lambda entry: entry.status,
        "metric": lambda entry: -entry.value,
        "cost": lambda entry: -entry.macs,
        "time": lambda entry: -entry.seconds,
    }
    if word not in orders:
        raise UserError(f"sort={word} is not accepted: it takes {listing(orders)}{did_you_mean(word, orders)}")
    value = orders[word]
    return lambda entry: (isinstance(found := value(entry), float) and math.isnan(found), found)
