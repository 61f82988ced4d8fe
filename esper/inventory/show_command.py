"""``esper show <run or sweep>``: the report of its end once more, from the files that it left."""

from __future__ import annotations

import json
import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from esper.errors import UserError
from esper.inventory.entries import DAMAGED, SWEEP, Entry
from esper.inventory.filters import chosen
from esper.inventory.find import find, read_targets
from esper.inventory.folder import entries
from esper.inventory.list_command import lines
from esper.inventory.store import store_of
from esper.report.end_of_run import print_report
from esper.report.summary_file import NAME as SUMMARY
from esper.report.summary_file import read_summary

USAGE = """\
usage: esper show [run or sweep] [output=…] [uri=…]   the report of its end once more; without a name that of the newest

  A run or sweep is named by its folder, its name, its id, or its run id in MLflow, as esper list shows them. A run whose folder is gone
  is read from the store. Of a sweep that has not been judged yet its jobs are shown.

  output   folder of all outputs (default: outputs)
  uri      tracking URI of an MLflow store; empty: mlflow.db in the folder of output; none: the folder alone"""
REPORT = "comparison.txt"


def main(words: Sequence[str]) -> int:
    """Print the report; exit code 0, or 1 where the run has left none yet."""
    if {"--help", "-h"} & set(words):
        print(USAGE, flush=True)
        return 0
    names, given = read_targets(words, "esper show", 1)
    entry = find(names[0] if names else "", given)
    if not names:
        print(f"the newest: {entry.folder or entry.store_id}", file=sys.stderr, flush=True)
    if entry.folder is None:
        uri = store_of(Path(given.get("output", "outputs")), given.get("uri", ""))[0]
        with tempfile.TemporaryDirectory(prefix="esper-") as place:
            return _show(entry, _downloaded(entry, uri, Path(place)))
    return _show(entry, entry.folder)


def _show(entry: Entry, folder: Path) -> int:
    if entry.kind == SWEEP:
        return _sweep(entry, folder)
    if (folder / SUMMARY).exists():
        print_report(read_summary(folder), _ui(folder))
        return 0
    sentence, code = _without_summary(entry)
    print(sentence, file=sys.stderr)
    return code


def _ui(folder: Path) -> str:
    """The command that opens the run's store; empty for a run without one."""
    from esper.tracking.config import ui_command

    note = folder / "mlflow.json"
    return ui_command(json.loads(note.read_text(encoding="utf-8"))["uri"]) if note.exists() else ""


def _without_summary(entry: Entry) -> tuple[str, int]:
    place = shlex.quote(str(entry.folder))
    said = {
        "RUNNING": f"The run in {place} is under way and has no report yet; esper watch {place} follows it.",
        "DIED": f"The run in {place} died before its report; esper resume={place} goes on with it.",
        "NEW": f"The run in {place} has not begun.",
        "FAILED": f"The run in {place} failed before its first step; job.log there has the reason.",
    }
    return said.get(entry.status, f"The run in {place} has left no report: it is {entry.status.lower()}."), 1


def _sweep(entry: Entry, folder: Path) -> int:
    """The comparison, or where there is none the jobs so far and the command that goes on."""
    import time

    if (folder / REPORT).exists():
        print((folder / REPORT).read_text(encoding="utf-8"), end="", flush=True)
        return 0
    if entry.status == DAMAGED:
        raise UserError(f"{folder / 'sweep.json'} cannot be read; restore it, or delete it: then the jobs count as runs of their own.")
    print(f"{entry.name}: {entry.status.lower()}, not judged yet" if entry.status != "FINISHED" else f"{entry.name}: nothing to compare")
    jobs = chosen(entries(folder), {"kind": "job,run"}, time.time())
    if jobs:
        print("\n".join(lines(jobs, time.time())))
    if entry.status != "RUNNING" and entry.status != "FINISHED":
        from esper.compare.sweep.resume import read_note

        command = [word for word in read_note(folder)["command"] if not word.startswith("hydra.sweep.dir=")]
        print(f"Go on with:\n  {shlex.join(['esper', *command, f'hydra.sweep.dir={folder}'])}")
    sys.stdout.flush()
    return 0 if entry.status == "FINISHED" else 1


def _downloaded(entry: Entry, uri: str, place: Path) -> Path:
    """The report of a run that the store alone has, as a file in ``place``.

    Raises:
        UserError: the store does not have it.
    """
    from esper.tracking.mlflow_store import quiet_client

    name = REPORT if entry.kind == SWEEP else SUMMARY
    client = quiet_client(uri, "uri", "or name another store with uri=…")
    try:
        client.download_artifacts(entry.store_id, name, str(place))
    except Exception as error:  # whatever the store's kind of files raises
        raise UserError(f"Run {entry.store_id} has left no {name} in the store, so there is no report to show.") from error
    return place
