"""What computed a run: ``environments.json`` in its folder has an entry for each of its lives whose environment is another than before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from esper.checkpoint import store
from esper.errors import UserError
from esper.report.summary_file import NAME as SUMMARY
from esper.report.summary_file import read_summary

NAME = "environments.json"

#: ``{"since": steps done before it, "environment": …}``; the environment is None for lives of which nothing was recorded.
Life = dict[str, Any]


def note_life(folder: Path, since: int, environment: dict[str, Any]) -> None:
    """A life begins after step ``since``: what earlier ones did beyond it is done again, and their entries go."""
    earlier = [life for life in lives(folder) if life["since"] < since]
    if since and not earlier and store.checkpoints(folder / store.FOLDER):  # a fork begins with none of its own
        earlier = [{"since": 0, "environment": _of_summary(folder)}]
    if not earlier or earlier[-1]["environment"] != environment:
        earlier.append({"since": since, "environment": environment})
    temporary = folder / f".{NAME}.tmp"
    temporary.write_text(json.dumps(earlier, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    temporary.replace(folder / NAME)


def lives(folder: Path) -> list[Life]:
    """The entries, oldest first; none where none were written yet. Raises UserError for a file that is damaged."""
    path = folder / NAME
    if not path.exists():
        return []
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
        found: list[Life] = [{"since": int(life["since"]), "environment": life["environment"]} for life in read]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error}); delete it, and what computed the run before counts as not recorded.") from error
    return found


def _of_summary(folder: Path) -> Any:
    """What the life before told, in a folder of before there was this file."""
    return read_summary(folder).get("environment") if (folder / SUMMARY).exists() else None
