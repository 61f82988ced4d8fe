"""The Parquet files of a run's folder, written with every option of ``tracking``: seeds, transitions, gates and metrics.

While the run goes on, its rows are small complete files under ``.parts``; a run that is killed loses at most the rows that were not
flushed. At the end they are streamed into one file each, which appears under its name only when it is whole.
A resumed run repeats the messages after its checkpoint: of the earlier parts only rows up to that tick are kept.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from esper.bus.codec import to_plain
from esper.messages import Alert, GateResult, Message, Metrics, RunEnded, RunStarted, Telemetry, Transition
from esper.tracking.arrow_tables import TABLES
from esper.tracking.run_info import RunInfo

if TYPE_CHECKING:
    import pyarrow as pa

GROUP_ROWS = 1 << 16
BUFFER_BYTES = 32 << 20
PARTS = ".parts"
SINCE = b"esper.since"
STARTED, ALERTS = "started.json", "alerts.jsonl"  # among the parts, for those who watch the run; its summary has the alerts
ONCE = {"metrics": ["tick", "name"]}
"""Key columns of tables in which the last of several rows with the same key stands."""


@dataclass
class Session:
    """One start of the run, as seen in one of its streams; ``since`` is the tick that it continued from."""

    number: int
    since: int = 0


class ParquetFiles:
    """``seeds``, ``transitions``, ``gates`` and ``metrics`` as Parquet in the run's folder; memory is bounded."""

    wants_model = False
    called = "writing the Parquet files"

    def __init__(self) -> None:
        """Import the library here, before training begins: in the tracker's thread that would hold up the steps."""
        import pyarrow.parquet  # noqa: F401

    def open(self, info: RunInfo) -> None:
        """Find out which session of the run this is; finished files of an earlier one become its parts."""
        self._folder = Path(info.folder)
        self._parts = self._folder / PARTS
        self._parts.mkdir(parents=True, exist_ok=True)
        for name in TABLES:
            whole = self._folder / f"{name}.parquet"
            if whole.exists():
                for part in self._parts.glob(f"{name}.*"):  # killed while closing: the whole file holds them already
                    part.unlink()
                os.replace(whole, self._parts / f"{name}.0000.000000.parquet")
        session = max(map(session_of, self._parts.glob("*.*.*.parquet")), default=-1) + 1
        self._sessions = {"telemetry": Session(session), "events": Session(session)}
        self._part, self._bytes, self._heard = 0, 0, False
        self._said: dict[str, int] = {}
        self._end: int | None = None
        self._alerts: list[Alert] = []
        self._waiting: dict[str, list[Message]] = {name: [] for name in TABLES}

    def record(self, messages: Sequence[Message]) -> None:
        """Sort messages by table."""
        waiting = self._waiting
        for message in messages:
            match message:
                case Telemetry():
                    self._follow(message)
                    waiting["seeds"].append(message)
                    self._bytes += len(message.data)
                case Metrics():
                    waiting["metrics"].append(message)
                case Transition():
                    waiting["transitions"].append(message)
                case GateResult():
                    waiting["gates"].append(message)
                case Alert():
                    self._alerts.append(message)
                case RunStarted():
                    self._write_started(message)
                    self._started(message.tick)
                case RunEnded():
                    self._end = message.tick
        if self._bytes > BUFFER_BYTES:
            self.flush()

    def _write_started(self, message: RunStarted) -> None:
        beside = self._parts / f"{STARTED}.tmp"
        beside.write_text(json.dumps(to_plain(message)), encoding="utf-8")
        os.replace(beside, self._parts / STARTED)

    def _started(self, tick: int) -> None:
        """A tracker in its own process may see a run end, or die, and continue: there the events begin a new session."""
        self._end = None
        if self._heard:
            self._begin_session("events", tick)
        else:
            for session in self._sessions.values():
                session.since = tick
        self._heard = True

    def _follow(self, message: Telemetry) -> None:
        """Telemetry is not read in step with the events, so its new session begins where its own ticks go back."""
        if message.ticks[0] <= self._said.get(message.site, -1):
            self._begin_session("telemetry", message.ticks[0] - 1)
            self._said.clear()
        self._said[message.site] = message.ticks[-1]

    def _begin_session(self, stream: str, since: int) -> None:
        self.flush()
        self._sessions[stream] = Session(self._sessions[stream].number + 1, since)

    def flush(self) -> None:
        """Write all waiting messages as one more part."""
        import pyarrow.parquet as pq

        for name, messages in self._waiting.items():
            if messages:
                session = self._sessions[stream_of(name)]
                table = TABLES[name](messages)
                table = table.replace_schema_metadata({SINCE: str(session.since).encode()})
                part = self._parts / f"{name}.{session.number:04d}.{self._part:06d}.parquet"
                pq.write_table(table, part.with_suffix(".tmp"))
                os.replace(part.with_suffix(".tmp"), part)
                messages.clear()
        if self._alerts:
            with (self._parts / ALERTS).open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(to_plain(alert)) + "\n" for alert in self._alerts)
            self._alerts.clear()
        self._part, self._bytes = self._part + 1, 0

    def close(self, status: str, summary: Mapping[str, Any]) -> None:
        """Merge the parts into one file for each table."""
        self.flush()
        limits = {stream: self._limits(stream) for stream in self._sessions}
        for name, make in TABLES.items():
            parts = sorted(self._parts.glob(f"{name}.*.parquet"))
            _merge(parts, self._folder / f"{name}.parquet", make([]).schema, limits[stream_of(name)], ONCE.get(name))
        if (self._parts / STARTED).exists():  # without the sites a later reader could not tell what the rows were about
            os.replace(self._parts / STARTED, self._folder / STARTED)
        for left in self._parts.iterdir():
            left.unlink()
        self._parts.rmdir()

    def _limits(self, stream: str) -> dict[int, int | None]:
        """The last tick of each session that counts, before a later session or the end of the run; None if all count.

        A session counts in every table of its stream, also where it sent no message: then the replaced rows were not repeated.
        """
        import pyarrow.parquet as pq

        parts = [part for name in TABLES if stream_of(name) == stream for part in self._parts.glob(f"{name}.*.parquet")]
        since = {session_of(part): int((pq.read_schema(part).metadata or {}).get(SINCE, b"0")) for part in parts}
        if self._heard:
            since[self._sessions[stream].number] = self._sessions[stream].since
        ends = [] if self._end is None else [self._end]
        return {session: min([*ends, *(tick for later, tick in since.items() if later > session)], default=None) for session in since}


def _merge(parts: list[Path], target: Path, schema: pa.Schema, limits: Mapping[int, int | None], once: list[str] | None) -> None:
    """Stream ``parts`` into ``target``, dropping rows of earlier sessions that a later session replaces; ``once`` as in ONCE."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    if parts:
        schema = pq.read_schema(parts[-1]).remove_metadata()
    waiting: list[pa.Table] = []
    temporary = target.with_suffix(".tmp")
    with pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
        for part in parts:
            table = pq.read_table(part).replace_schema_metadata(None)
            limit = limits[session_of(part)]
            if limit is not None:
                table = table.filter(pc.field("tick") <= limit)
            waiting.append(_with_columns(table, schema))
            if sum(map(len, waiting)) >= GROUP_ROWS:
                whole = last_rows(waiting, once)
                last = pc.max(whole["tick"]) if once else None  # the next part may say this tick's values again
                waiting = [whole.filter(pc.field("tick") == last)] if once else []
                writer.write_table(whole.filter(pc.field("tick") != last) if once else whole, row_group_size=GROUP_ROWS)
        if waiting:
            writer.write_table(last_rows(waiting, once), row_group_size=GROUP_ROWS)
    os.replace(temporary, target)


def _with_columns(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """The table with the columns of ``schema``; one that an earlier version did not write is empty."""
    import pyarrow as pa

    for field in schema:
        if field.name not in table.schema.names:
            table = table.append_column(field, pa.nulls(len(table), field.type))
    return table.select(schema.names)


def last_rows(tables: list[pa.Table], once: list[str] | None) -> pa.Table:
    """The tables as one; of rows that agree in the columns ``once`` only the last is kept."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc

    whole = pa.concat_tables(tables).unify_dictionaries()
    if not once:
        return whole
    numbered = whole.select(once).append_column("row", pa.array(np.arange(len(whole))))
    rows = numbered.group_by(once, use_threads=False).aggregate([("row", "max")])["row_max"]
    return whole if len(rows) == len(whole) else whole.take(rows.take(pc.sort_indices(rows)))


def session_of(part: Path) -> int:
    return int(part.name.split(".")[1])


def stream_of(table: str) -> str:
    """Where a table's messages come from."""
    return "telemetry" if table == "seeds" else "events"
