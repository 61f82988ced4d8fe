"""``esper bus status | tail | dead-letters | flush <run folder>``: the contents of a run's bus, for people and programs."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from esper.bus.codec import to_plain
from esper.bus.discovery import joined
from esper.bus.programs import flush
from esper.bus.protocol import STREAMS, DeadLetter, counts_in_words
from esper.bus.server.bus import ServerBus
from esper.bus.server.status import status
from esper.errors import UserError

NAMED = 20  # runs that a refusal names


def main(argv: Sequence[str]) -> int:
    """Run one of the commands; the exit code is 0, or 1 where there was nothing to act on."""
    options = _parser().parse_args(list(argv))
    if options.command == "flush":
        return flush.flush(options)
    with joined(options.folder.resolve()) as (bus, found):
        if options.run:
            _refuse_unknown(bus, options.run)
        return COMMANDS[options.command](bus, options.run or found.run, options)


def _refuse_unknown(bus: ServerBus, run: str) -> None:
    known = bus.runs()
    if run not in known:
        some = ", ".join(map(shown, known[:NAMED])) + (f" and {len(known) - NAMED} more" if len(known) > NAMED else "")
        raise UserError(f"the server at {bus.address!r} has no run {run}: it has {some or 'none yet'}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="esper bus", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("status", "streams, groups, what waits and for how long"),
        ("tail", "messages as they come"),
        ("dead-letters", "list, replay or purge what was given up on"),
    ):
        command = commands.add_parser(name, help=text)
        if name == "dead-letters":
            command.add_argument("action", choices=("list", "replay", "purge"))
        command.add_argument("folder", type=Path, help="output folder of the run")
        command.add_argument("--run", help="another run on the same server")
        command.add_argument("--json", action="store_true", help="one JSON document, or one a line")
        if name == "tail":
            command.add_argument("--stream", choices=STREAMS, default="events")
            command.add_argument("--count", type=int, default=20, help="how many of the newest to begin with")
            command.add_argument("--follow", action="store_true", help="go on until interrupted")
        if name == "dead-letters":
            command.add_argument("--id", action="append", default=[], help="which (repeatable); without it all")
    flush.arguments(commands.add_parser("flush", help="send what waits on disk since the server did not answer"))
    return parser


def _status(bus: ServerBus, run: str, options: argparse.Namespace) -> int:
    found = status(bus, run)
    if options.json:
        _write(found)
        return 0
    columns = ("stream", "producer", "entries", "last id", "group", "pending", "oldest", "behind")
    rows: list[tuple[object, ...]] = []
    for stream in found.streams:
        groups: list[tuple[object, ...]] = [
            (group.name, group.pending, f"{group.oldest_s:.1f} s" if group.pending else "–", group.behind) for group in stream.groups
        ]
        rows += [(stream.stream, stream.producer, stream.entries, stream.last, *group) for group in groups or [("–",) * 4]]
    _table(f"run {run}: {found.dead_letters} dead letters, server {found.server}", columns, rows)
    for process, counts in found.counts.items():
        if any(counts.values()):
            print(f"{process}: {counts_in_words(counts)}")
    return 0


def _tail(bus: ServerBus, run: str, options: argparse.Namespace) -> int:
    if options.count < 1:
        raise UserError(f"--count {options.count}: give how many of the newest messages to begin with, 1 or more")
    for producer, id, envelope in bus.newest(options.stream, run, options.count, options.follow):
        message = msgspec.to_builtins(to_plain(envelope.body))
        message.pop("data", None)  # a telemetry buffer says nothing to a reader
        if options.json:
            _write({"producer": producer, "id": id, "time": envelope.time, "message": message})
            continue
        kind = message.pop("kind")
        moment = time.strftime("%H:%M:%S", time.localtime(envelope.time))
        print(shown(" ".join([moment, producer, id, kind, *(f"{name}={value}" for name, value in message.items())])), flush=True)
    return 0


def _dead_letters(bus: ServerBus, run: str, options: argparse.Namespace) -> int:
    letters = bus.dead_letters(run)
    chosen = [letter for letter in letters if not options.id or letter.id in options.id]
    if unknown := set(options.id) - {letter.id for letter in letters}:
        raise UserError(f"there is no dead letter {', '.join(sorted(unknown))}: `esper bus dead-letters list` names them")
    if options.action != "list":
        act = bus.replay if options.action == "replay" else bus.purge
        done = act(run, [letter.id for letter in chosen])
        word = "replayed" if options.action == "replay" else "purged"
        _write({word: done}) if options.json else print(f"{done} dead letters {word}")
        return 0 if done else 1
    if options.json:
        _write([_plain(letter) for letter in letters])
        return 0
    print(f"{len(letters)} dead letters of run {run}")
    for letter in letters:
        kind = type(letter.message).__name__ if letter.message is not None else "unreadable"
        where = f"{letter.origin} of {letter.stream} {letter.producer} in group {letter.group or '–'}"
        print(shown(f"{letter.id}  {kind} {where}: {letter.reason}"))
    return 0


def _plain(letter: DeadLetter) -> dict[str, Any]:
    plain: dict[str, Any] = msgspec.structs.asdict(letter)
    return plain | {"message": None if letter.message is None else to_plain(letter.message)}


def shown(text: str) -> str:
    """``text`` with everything escaped that would act on a terminal instead of being seen there: anybody may write to a server."""
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)


def _write(value: Any) -> None:
    sys.stdout.write(msgspec.json.encode(value).decode() + "\n")
    sys.stdout.flush()


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Columns as wide as their contents: no name or number is cut, however narrow the terminal or the pipe."""
    lines = [columns, *(tuple(shown(str(cell)) for cell in row) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    print(title)
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


COMMANDS: dict[str, Callable[[ServerBus, str, argparse.Namespace], int]] = {
    "status": _status,
    "tail": _tail,
    "dead-letters": _dead_letters,
}
