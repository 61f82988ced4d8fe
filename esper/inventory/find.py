"""The run or sweep that a word names: its folder, its name or its id."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from esper.compare.sweep.resume import NOTE as SWEEP_NOTE
from esper.errors import UserError
from esper.inventory.entries import JOB, RUN, SWEEP, Entry
from esper.inventory.filters import PLACES, read_words
from esper.inventory.folder import MARKS, Found, run_entry, sweep_entry
from esper.inventory.list_command import known

NAMED = 5  # entries that a refusal names


def read_targets(words: Sequence[str], program: str, number: int, keys: Sequence[str] = PLACES) -> tuple[list[str], dict[str, str]]:
    """The first ``number`` words at most, which name runs, and the settings.

    Raises:
        UserError: more names than that, or as ``read_words``.
    """
    names = [word for word in words if "=" not in word or " " in word.partition("=")[0] or Path(word).exists()]
    given = read_words([word for word in words if word not in names], program, keys)
    if strange := next((word for word in names if word.startswith("-")), ""):
        raise UserError(f"'{strange}' is no option of {program}; {program} --help lists what it takes.")
    if len(names) > number:
        takes = "one run" if number == 1 else f"{number} runs"
        raise UserError(f"{program} takes {takes}, and {len(names)} are named: {', '.join(names)}.")
    return names, given


def find(name: str, given: Mapping[str, str]) -> Entry:
    """The run or sweep called ``name``, which may be a folder; an empty name stands for the newest run or sweep.

    Raises:
        UserError: there is none, or several have the name.
    """
    here = Path(name)
    if name and here.is_dir():
        return in_folder(here)
    found = known(given)
    place = given.get("output", "outputs")
    if not name:
        if not found:
            raise UserError(f"There is no run in {place} yet; name the folder of one, or that of all outputs: output=….")
        return max((entry for entry in found if entry.kind != JOB), key=lambda entry: entry.changed)
    for exact in (
        lambda entry: name in (entry.id, entry.store_id),
        lambda entry: entry.name == name,
        lambda entry: entry.folder is not None and entry.folder.name == here.name,
    ):
        same = [entry for entry in found if exact(entry)]
        if len(same) > 1:
            some = ", ".join(str(entry.folder or entry.store_id) for entry in same[:NAMED]) + (", …" if len(same) > NAMED else "")
            raise UserError(f"{len(same)} runs are called {name}; name one by its folder: {some}.")
        if same:
            return same[0]
    raise UserError(f"There is no run or sweep {name} in {place}, nor a folder of this name; esper list shows those that there are.")


def in_folder(folder: Path) -> Entry:
    """The run or sweep in this folder.

    Raises:
        UserError: there is none.
    """
    files = frozenset(path.name for path in folder.iterdir() if path.is_file())
    if SWEEP_NOTE in files:
        return sweep_entry(Found(SWEEP, folder, files))
    if any(mark in files for mark in MARKS):
        return run_entry(Found(RUN, folder, files))
    raise UserError(f"{folder} is no run's and no sweep's folder; esper list shows those that there are.")


def run_folder(name: str, given: Mapping[str, str], program: str) -> Path:
    """The folder of the run called ``name``.

    Raises:
        UserError: as ``find``; a sweep; a run whose folder is gone.
    """
    entry = find(name, given)
    if entry.kind == SWEEP:
        raise UserError(f"{name or entry.id} is a sweep, and {program} takes runs; esper list sweep={entry.id} names its jobs.")
    if entry.folder is None:
        raise UserError(f"The folder of run {name} is gone, only its record in the store is left, and {program} reads the files of a run.")
    return entry.folder
