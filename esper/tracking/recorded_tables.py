"""The tables of a run's folder read back, finished or not: the whole file where there is one, else its parts so far."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from esper.errors import UserError
from esper.tracking.arrow_tables import TABLES
from esper.tracking.parquet_files import ONCE, PARTS, SINCE, last_rows, session_of, stream_of

if TYPE_CHECKING:
    import pyarrow as pa


def read_recorded(folder: Path, name: str, columns: Sequence[str] | None = None) -> pa.Table:
    """The rows of table ``name`` (one of ``TABLES``) that a run has recorded so far, those of replaced sessions left out; maybe none.

    Raises:
        UserError: a file that is damaged.
    """
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    wanted = None if columns is None else list(columns)
    whole = folder / f"{name}.parquet"
    try:
        if whole.exists():
            return pq.read_table(whole, columns=wanted)
        limits = _limits(folder / PARTS, stream_of(name))
        found = []
        for part in sorted((folder / PARTS).glob(f"{name}.*.parquet")):
            table = pq.read_table(part).replace_schema_metadata(None)
            limit = limits.get(session_of(part))
            found.append(table if limit is None else table.filter(pc.field("tick") <= limit))
        table = last_rows(found, ONCE.get(name)) if found else TABLES[name]([])
    except FileNotFoundError:  # the run has ended in between and put its parts together
        if whole.exists():
            return pq.read_table(whole, columns=wanted)
        raise
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{whole} cannot be read ({' '.join(str(error).split())}); restore it, or train the run again.") from error
    return table if wanted is None else table.select(wanted)


def _limits(parts: Path, stream: str) -> dict[int, int | None]:
    """The last tick of every session that counts: a later session begins after it."""
    import pyarrow.parquet as pq

    since: dict[int, int] = {}
    for name in TABLES:
        if stream_of(name) == stream:
            for part in parts.glob(f"{name}.*.parquet"):
                if session_of(part) not in since:
                    since[session_of(part)] = int((pq.read_schema(part).metadata or {}).get(SINCE, b"0"))
    return {session: min((tick for later, tick in since.items() if later > session), default=None) for session in since}
