"""The Parquet files of a run's folder, written whatever the tracking: seeds, transitions, gates and metrics.

While the run lives its rows are small complete files under ``.parts``; a run that is killed loses at most what was not
flushed. At the end they are streamed into one file each, which appears under its name only when it is whole.
A resumed run says again what came after its checkpoint: of the earlier parts only rows up to that tick are kept.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from esper.bus.messages import GateResult, Message, Metrics, RunStarted, Telemetry, Transition
from esper.tracking.record import RunRecord
from esper.tracking.tables import TABLES

if TYPE_CHECKING:
    import pyarrow as pa

GROUP_ROWS = 1 << 16
BUFFER_BYTES = 32 << 20
PARTS = ".parts"
SINCE = b"esper.since"


class ParquetFiles:
    """``seeds``, ``transitions``, ``gates`` and ``metrics`` as Parquet in the run's folder; memory is bounded."""

    wants_model = False
    called = "writing the Parquet files"

    def __init__(self) -> None:
        """Import the library here, before training begins: in the tracker's thread that would hold up the steps."""
        import pyarrow.parquet  # noqa: F401

    def open(self, record: RunRecord) -> None:
        """Find out which life of the run this is; finished files of an earlier one become its parts."""
        self._folder = Path(record.folder)
        self._parts = self._folder / PARTS
        self._parts.mkdir(parents=True, exist_ok=True)
        for name in TABLES:
            whole = self._folder / f"{name}.parquet"
            if whole.exists():
                for part in self._parts.glob(f"{name}.*"):  # killed while closing: the whole file holds them already
                    part.unlink()
                os.replace(whole, self._parts / f"{name}.0000.000000.parquet")
        lives = [int(path.name.split(".")[1]) for path in self._parts.glob("*.*.*.parquet")]
        self._life = max(lives, default=-1) + 1
        self._since, self._part, self._bytes, self._heard = 0, 0, 0, False
        self._waiting: dict[str, list[Message]] = {name: [] for name in TABLES}

    def record(self, messages: Sequence[Message]) -> None:
        """Sort messages by the table they go to."""
        waiting = self._waiting
        for message in messages:
            match message:
                case Telemetry():
                    waiting["seeds"].append(message)
                    self._bytes += len(message.data)
                case Metrics():
                    waiting["metrics"].append(message)
                case Transition():
                    waiting["transitions"].append(message)
                case GateResult():
                    waiting["gates"].append(message)
                case RunStarted():
                    self._begin_life(message.tick)
        if self._bytes > BUFFER_BYTES:
            self.flush()

    def _begin_life(self, tick: int) -> None:
        """A tracker in a process of its own may hear a run end, or die, and go on."""
        if self._heard:
            self.flush()
            self._life += 1
        self._heard, self._since = True, tick

    def flush(self) -> None:
        """Write what waits as one more part."""
        import pyarrow.parquet as pq

        for name, messages in self._waiting.items():
            if messages:
                table = TABLES[name](messages)
                table = table.replace_schema_metadata({SINCE: str(self._since).encode()})
                part = self._parts / f"{name}.{self._life:04d}.{self._part:06d}.parquet"
                pq.write_table(table, part.with_suffix(".tmp"))
                os.replace(part.with_suffix(".tmp"), part)
                messages.clear()
        self._part, self._bytes = self._part + 1, 0

    def close(self, status: str, summary: Mapping[str, Any]) -> None:
        """Make the parts one file a table."""
        self.flush()
        for name, make in TABLES.items():
            _merge(sorted(self._parts.glob(f"{name}.*.parquet")), self._folder / f"{name}.parquet", make([]).schema)
        for left in self._parts.iterdir():
            left.unlink()
        self._parts.rmdir()


def _merge(parts: list[Path], target: Path, schema: pa.Schema) -> None:
    """Stream ``parts`` into ``target``, dropping rows of earlier lives that a later life said again."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    if parts:
        schema = pq.read_schema(parts[-1]).remove_metadata()
    last_ticks = _last_ticks(parts)
    waiting: list[pa.Table] = []
    temporary = target.with_suffix(".tmp")
    with pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
        for part in parts:
            table = pq.read_table(part).replace_schema_metadata(None)
            limit = last_ticks[_life(part)]
            if limit is not None:
                table = table.filter(pc.field("tick") <= limit)
            waiting.append(table.select(schema.names))
            if sum(map(len, waiting)) >= GROUP_ROWS:
                writer.write_table(pa.concat_tables(waiting).unify_dictionaries(), row_group_size=GROUP_ROWS)
                waiting = []
        if waiting:
            writer.write_table(pa.concat_tables(waiting).unify_dictionaries(), row_group_size=GROUP_ROWS)
    os.replace(temporary, target)


def _life(part: Path) -> int:
    return int(part.name.split(".")[1])


def _last_ticks(parts: list[Path]) -> dict[int, int | None]:
    """By life of the run, the last tick that counts: where the earliest later life took over; None for all."""
    import pyarrow.parquet as pq

    since = {_life(part): int((pq.read_schema(part).metadata or {}).get(SINCE, b"0")) for part in parts}
    return {life: min((tick for later, tick in since.items() if later > life), default=None) for life in since}
