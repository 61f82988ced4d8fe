"""A plan for runs to come in any store: registered before the first of them, known again by the digest of its text."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from esper.compare.results.plan import Plan, parse_plan
from esper.errors import UserError


def digest_of(text: str) -> str:
    """SHA-256 of a plan's text, in hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Registered:
    """A plan, the selection of the runs it is about, and when it was registered, in seconds since 1970.

    ``selection`` has the keys of :class:`~esper.compare.sources.selection.Selection`.
    """

    plan: Plan
    selection: dict[str, Any]
    when: float

    def text(self) -> str:
        """The registered plan as JSON; its digest is what proves it later."""
        stamp = datetime.fromtimestamp(self.when, UTC).isoformat(timespec="seconds")
        tree = {"registered": stamp, "selection": self.selection, "plan": dataclasses.asdict(self.plan)}
        return json.dumps(tree, indent=2)


def parse_registered(text: str, place: str) -> Registered:
    """The inverse of :meth:`Registered.text`.

    Raises:
        UserError: no such text; ``place`` names it.
    """
    try:
        tree = json.loads(text)
        when = datetime.fromisoformat(tree["registered"]).timestamp()
        return Registered(parse_plan(json.dumps(tree["plan"])), dict(tree["selection"]), when)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{place} is no plan that esper compare plan registered ({error}); give the path or the name of one.") from error


def save_registered(registered: Registered, path: Path) -> str:
    """Write the plan, once, and return its digest: a plan that is there is never replaced.

    Raises:
        UserError: the file exists, or cannot be written.
    """
    text = registered.text()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise UserError(f"{path} is there already, and a plan is never replaced; give this one another name: plan=….") from None
    except OSError as error:
        raise UserError(f"The plan cannot be written to {path} ({str(error.strerror).lower()}); give another path: plan=….") from error
    return digest_of(text)


def departures(registered: Registered, selection: Mapping[str, Any], started: Mapping[str, float]) -> list[str]:
    """Why runs chosen like this are not those that the plan is about; empty where they are.

    Args:
        selection: the one that is used.
        started: when each run began, in seconds since 1970, as far as that is known.
    """
    found = [
        f"{key} was {_shown(registered.selection.get(key))} in the plan and is {_shown(value)} now"
        for key, value in selection.items()
        if key != "curve" and _plain(value) != _plain(registered.selection.get(key))
    ]
    early = sum(start < math.floor(registered.when) for start in started.values())
    if early:
        found.append(f"{early} of {len(started)} runs began before the plan was registered")
    return found


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _shown(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
