"""``esper clean``: what may go of the outputs folder, how much space that gives, and, once the user agrees, its removal."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from esper.config import did_you_mean, listing
from esper.errors import UserError
from esper.inventory.clean_rules import KINDS, UNASKED, Item, may_go, remove
from esper.inventory.filters import chosen, read_words
from esper.inventory.list_command import ago, aligned

USAGE = """\
usage: esper clean [what=…] [older=…] [name=…] [output=…] [--yes]   what may go, how much space that gives; asks before it removes anything

  what     {kinds}; several as a,b, or all (default: {unasked})
  older    only what was changed at least that long ago, as in older=7d (s, m, h, d or w)
  name     part of a run's name or of its folder's name, or a pattern with * and ?
  output   folder of all outputs (default: outputs)
  --yes    do not ask

{explained}

What stays: everything that is under way; sweeps with their plans, results and jobs; finished runs; files that esper did not write, with the
folders that they are in; and the record of every run in MLflow, which `mlflow gc` cleans up.
Exit code 0; 1 where something could not be removed, or where there was nobody to ask."""
BYTES = ("B", "kB", "MB", "GB", "TB")


def main(words: Sequence[str]) -> int:
    """Show, ask, remove."""
    if {"--help", "-h"} & set(words):
        explained = "\n".join(f"  {kind:<12} {text}" for kind, text in KINDS.items())
        print(USAGE.format(kinds=listing(KINDS), unasked=",".join(UNASKED), explained=explained), flush=True)
        return 0
    given = read_words([word for word in words if word != "--yes"], "esper clean", ("what", "older", "name", "output"))
    kinds = _kinds(given.pop("what", ",".join(UNASKED)))
    output = Path(given.pop("output", "outputs"))
    if not output.is_dir():
        raise UserError(f"There is no folder {output}, in which runs would be; name the folder of all outputs: output=….")
    found = may_go(output)
    entries = {id(entry) for entry in chosen([item.entry for item in found], given | {"kind": "run,job"}, time.time())}
    found = [item for item in found if id(item.entry) in entries]
    going = [item for item in found if item.kind in kinds]
    _show(found, going, kinds, output)
    if not going or not _agreed("--yes" in words, going):
        return 0 if not going or sys.stdin.isatty() else 1
    return _remove(going)


def _kinds(text: str) -> list[str]:
    kinds = list(KINDS) if text == "all" else [word for word in text.split(",") if word]
    for word in kinds:
        if word not in KINDS:
            raise UserError(f"what={word} is not accepted: it takes {listing([*KINDS, 'all'])}{did_you_mean(word, [*KINDS, 'all'])}")
    return kinds


def _show(found: Sequence[Item], going: Sequence[Item], kinds: Sequence[str], output: Path) -> None:
    """A line for everything that would go, and a sentence about the kinds that were not asked for."""
    if going:
        now = time.time()
        rows = [(item.kind, size(item.inside.size), ago(now - item.entry.changed), item.entry.status, str(item.place)) for item in going]
        print("\n".join(aligned([("WHAT", "SPACE", "AGE", "STATUS", "FOLDER"), *rows], right=(1, 2))))
        for item in going:
            for path in item.inside.others:
                print(f"stays: {path}, which esper did not write")
        print(f"{len(going)} {'folder' if len(going) == 1 else 'folders'}, {size(sum(item.inside.size for item in going))}")
    else:
        print(f"Nothing of {listing(kinds)} may go below {output}.")
    for kind, about in KINDS.items():
        others = [item for item in found if item.kind == kind]
        if others and kind not in kinds:
            print(f"what={kind} would give {size(sum(item.inside.size for item in others))} of {len(others)}: {about}")
    sys.stdout.flush()


def _agreed(unasked: bool, going: Sequence[Item]) -> bool:
    """Whether the user, asked on the terminal, agrees; without a terminal nobody does."""
    if unasked:
        return True
    if not sys.stdin.isatty():
        print("esper: nothing was removed, for there is no terminal to ask on; --yes removes without asking", file=sys.stderr)
        return False
    try:
        answer = input(f"Remove {'it' if len(going) == 1 else f'these {len(going)}'}? [y/N] ")
    except EOFError:
        answer = ""
    if answer.strip().lower() in ("y", "yes"):
        return True
    print("Nothing was removed.")
    return False


def _remove(going: Sequence[Item]) -> int:
    freed, failed = 0, 0
    for item in going:
        try:
            remove(item)
            freed += item.inside.size
        except (UserError, OSError) as error:
            failed += 1
            why = str(error) if isinstance(error, UserError) else f"{error.filename}: {str(error.strerror).lower()}"
            print(f"esper: {item.place} stays: {why}", file=sys.stderr)
    print(f"removed: {len(going) - failed}, {size(freed)}", flush=True)
    return 1 if failed else 0


def size(number: float) -> str:
    """``1.2 GB``."""
    power = 0
    while number >= 1000 and power < len(BYTES) - 1:
        number, power = number / 1000, power + 1
    return f"{number:.3g} {BYTES[power]}"
