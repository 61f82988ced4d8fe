"""Where the messages of a watched run come from: its bus on a server, or the files that it records while it goes on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from esper.bus.codec import from_plain
from esper.errors import UserError
from esper.lifecycle.stages import Stage
from esper.messages import GateResult, Message, Metrics, RunEnded, RunStarted, Telemetry, Transition
from esper.report.summary_file import NAME as SUMMARY
from esper.report.summary_file import read_summary
from esper.running.run_folder import status
from esper.telemetry_columns import COLUMNS
from esper.tracking.parquet_files import ALERTS, PARTS, STARTED
from esper.tracking.recorded_tables import read_recorded

if TYPE_CHECKING:
    import pyarrow as pa

    from esper.bus.server.bus import ServerBus

NEWEST_ROWS = 32  # messages of telemetry that a look begins with: a site sends a row every few ticks
NAMED = 20  # runs that a refusal names
MOST_PARTS = 2_000  # parts of a table that a look at a long run begins with


class Feed(Protocol):
    """New messages of one run; ``place`` says where they come from, ``problem`` why there may be none just now."""

    @property
    def place(self) -> str: ...
    @property
    def problem(self) -> str: ...

    def poll(self) -> list[Message]:
        """All that came since the last call; never waits."""


class BusFeed:
    """The run's streams on a server, read without taking part in a group."""

    def __init__(self, bus: ServerBus, run: str) -> None:
        self.place, self.problem = f"bus at {bus.address!r}", ""
        self._bus, self._run = bus, run
        self._stands: dict[str, dict[str, str]] = {"events": {}, "telemetry": {}}

    def poll(self) -> list[Message]:
        """The events from the first that is left, and the newest telemetry."""
        import redis

        from esper.bus.server.connection import readable
        from esper.bus.telemetry_codec import unpacked

        found: list[Message] = []
        try:
            for stream, stands in self._stands.items():
                newest = NEWEST_ROWS if stream == "telemetry" else 0
                before = -1
                while len(found) != before:
                    before = len(found)
                    for _, _, envelope in self._bus.unread(stream, self._run, stands, newest):
                        body = envelope.body
                        found.append(unpacked(body) if isinstance(body, Telemetry) else body)
            self.problem = ""
        except redis.RedisError as error:
            self.problem = str(readable(self._bus.address, error))
        return found


class FileFeed:
    """The parts that the run's tracker writes every few seconds, and the whole files at the end."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.place, self.problem = folder, f"files in {folder}", ""
        self._read: set[str] = set()
        self._started, self._alerts, self._over = "", 0, False

    def poll(self) -> list[Message]:
        """New parts; once the run has ended, all that the folder holds."""
        if self._over:
            return []
        try:
            now = status(self.folder)
            if now not in ("RUNNING", "NEW", "DIED"):
                return self._whole(now)
            found = [*self._begun(), *self._events(), *self._rows(), *self._said()]
        except FileNotFoundError:  # the run is putting its parts together
            return []
        if now == "DIED":
            self._over = True
            found.append(RunEnded(tick=0, status="DIED", summary={}))
        return found

    def _begun(self) -> list[Message]:
        path = self.folder / PARTS / STARTED
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        if not text or text == self._started:
            return []
        self._started = text
        return [_message(text)]

    def _said(self) -> list[Message]:
        path = self.folder / PARTS / ALERTS
        if not path.exists():
            return []
        with path.open(encoding="utf-8") as file:
            file.seek(self._alerts)
            lines = [line for line in file.read().splitlines(keepends=True) if line.endswith("\n")]
        self._alerts += sum(len(line.encode()) for line in lines)
        return [_message(line) for line in lines]

    def _new(self, name: str) -> list[Path]:
        parts = sorted((self.folder / PARTS).glob(f"{name}.*.parquet"))[-MOST_PARTS:]
        new = [part for part in parts if part.name not in self._read]
        self._read |= {part.name for part in new}
        return new

    def _events(self) -> list[Message]:
        found: list[Message] = []
        for name, make in (("metrics", metrics_of), ("transitions", transitions_of), ("gates", gates_of)):
            for part in self._new(name):
                found += make(_rows(part))
        return sorted(found, key=lambda message: getattr(message, "tick", 0))

    def _rows(self) -> list[Message]:
        new = self._new("seeds")
        return telemetry_of(_rows(new[-1])) if new else []

    def _whole(self, ended: str) -> list[Message]:
        self._over = True
        summary = read_summary(self.folder) if (self.folder / SUMMARY).exists() else {}
        ticks = int(summary.get("ticks") or 0)
        found: list[Message] = [RunStarted(tick=0, total_ticks=ticks, sites=[])]
        try:
            events = [
                *metrics_of(read_recorded(self.folder, "metrics")),
                *transitions_of(read_recorded(self.folder, "transitions")),
                *gates_of(read_recorded(self.folder, "gates")),
            ]
            found += sorted(events, key=lambda message: getattr(message, "tick", 0))
            found += telemetry_of(read_recorded(self.folder, "seeds"))
        except UserError as error:
            self.problem = str(error)
        found += [_message(json.dumps({"kind": "Alert", **alert})) for alert in summary.get("alerts") or []]
        return [*found, RunEnded(tick=ticks, status=ended, summary={})]


def _rows(part: Path) -> pa.Table:
    import pyarrow.parquet as pq

    return pq.read_table(part).replace_schema_metadata(None)


def _message(text: str) -> Message:
    return from_plain(json.loads(text))


def metrics_of(table: pa.Table) -> list[Message]:
    """One message a tick."""
    by_tick: dict[int, dict[str, float]] = {}
    for tick, name, value in zip(*(table[name].to_pylist() for name in ("tick", "name", "value")), strict=True):
        by_tick.setdefault(tick, {})[name] = value
    return [Metrics(tick=tick, values=values) for tick, values in by_tick.items()]


def transitions_of(table: pa.Table) -> list[Message]:
    """One message a row."""
    return [Transition(**row | {name: int(Stage[row[name]]) for name in ("source", "target")}) for row in table.to_pylist()]


def gates_of(table: pa.Table) -> list[Message]:
    """One message a row."""
    return [GateResult(**row) for row in table.to_pylist()]


def telemetry_of(table: pa.Table) -> list[Message]:
    """The last row of every seed, a message a site."""
    import numpy as np
    import pyarrow.compute as pc

    found: list[Message] = []
    columns = [name for name in COLUMNS if name in table.column_names]
    for site in pc.unique(table["site"]).to_pylist():
        rows = table.filter(pc.equal(table["site"], site))
        tick = pc.max(rows["tick"]).as_py()
        last = rows.filter(pc.equal(rows["tick"], tick)).sort_by("seed")
        values = np.stack([last[name].to_numpy(zero_copy_only=False) for name in columns], axis=1).astype("<f4")
        found.append(Telemetry(site=site, ticks=[tick], seeds=len(last), columns=columns, data=values.tobytes()))
    return found


class FolderFeed:
    """The feed of the run in a folder here: its bus as long as that is on a server and the run goes on, its files else, and at its end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files = FileFeed(folder)
        self._held = ExitStack()
        self._bus = self._joined()

    def _joined(self) -> BusFeed | None:
        from esper.bus.discovery import NOTE, joined

        if status(self.folder) != "RUNNING" or not (self.folder / "bus" / NOTE).is_file():
            return None
        try:
            bus, found = self._held.enter_context(joined(self.folder.resolve()))
        except UserError:  # it has just ended, or does not answer: the files say as much
            return None
        return BusFeed(bus, found.run)

    @property
    def place(self) -> str:
        """The bus, or the files."""
        return (self._bus or self._files).place

    @property
    def problem(self) -> str:
        """Why nothing may come just now; empty where nothing is wrong."""
        return (self._bus or self._files).problem

    def poll(self) -> list[Message]:
        """All that came since the last call."""
        found = self._bus.poll() if self._bus is not None else []
        if self._bus is not None and status(self.folder) != "RUNNING":
            self.close()
        return found if self._bus is not None else [*found, *self._files.poll()]

    def close(self) -> None:
        """Let go of the bus; the files tell the rest."""
        self._bus = None
        self._held.close()


@contextmanager
def feed_elsewhere(run: str, settings: dict[str, Any], folder: Path) -> Iterator[tuple[BusFeed, str]]:
    """The feed of a run elsewhere, and its name: the bus on the server that ``settings`` of bus=redis describe.

    An empty ``run`` stands for the only one that the server has. ``folder`` is an empty one.

    Raises:
        UserError: the server does not answer, or has no such run.
    """
    from esper.bus.config import RedisConfig
    from esper.bus.server.bus import ServerBus
    from esper.bus.server.connection import address_of

    config = RedisConfig(**settings)
    bus = ServerBus(config, address_of(config), folder)
    try:
        known = bus.runs()
        if not run and len(known) == 1:
            run = known[0]
        if run not in known:
            some = ", ".join(known[:NAMED]) + (f" and {len(known) - NAMED} more" if len(known) > NAMED else "")
            asked = f"no run {run}" if run else "several runs, or none"
            raise UserError(f"The server at {bus.address!r} has {asked}; name one of these: {some or 'none yet'}.")
        yield BusFeed(bus, run), run
    finally:
        bus.close()
