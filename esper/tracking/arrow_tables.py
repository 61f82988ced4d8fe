"""Messages as Arrow tables: one function a Parquet file, the columns readable without this package."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from esper.lifecycle.stages import Stage
from esper.messages import GateResult, Metrics, Telemetry, Transition
from esper.telemetry_columns import COLUMNS
from esper.tracking.tracker import rows

if TYPE_CHECKING:
    import pyarrow as pa


def seeds(messages: list[Telemetry]) -> pa.Table:
    """One row a seed and tick: tick, site, seed, stage_name, then the telemetry columns as float32."""
    import pyarrow as pa

    columns = messages[0].columns if messages else list(COLUMNS)  # a run may end before its first telemetry
    blocks = [rows(message) for message in messages]
    ticks = [np.repeat(np.asarray(message.ticks, np.int64), message.seeds) for message in messages]
    numbers = [np.tile(np.arange(message.seeds, dtype=np.int32), len(message.ticks)) for message in messages]
    names = sorted({message.site for message in messages})
    codes = [np.full(len(tick), names.index(message.site), np.int32) for message, tick in zip(messages, ticks, strict=True)]
    values = np.concatenate([block.reshape(-1, len(columns)) for block in blocks]) if blocks else np.empty((0, len(columns)), np.float32)
    stage = values[:, columns.index("stage")].astype(np.int32)
    data: dict[str, Any] = {
        "tick": _join(ticks, np.int64),
        "site": pa.DictionaryArray.from_arrays(pa.array(_join(codes, np.int32)), pa.array(names, pa.string())),
        "seed": _join(numbers, np.int32),
        "stage_name": pa.DictionaryArray.from_arrays(pa.array(stage), pa.array([one.name for one in Stage])),
    }
    data |= {name: np.ascontiguousarray(values[:, index]) for index, name in enumerate(columns)}
    return pa.table(data)


def _join(parts: list[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate(parts) if parts else np.empty(0, dtype)


def transitions(messages: list[Transition]) -> pa.Table:
    """One row a transition, stages by name; ``why``, the controller's explanation, is JSON, empty where it gave none."""
    import pyarrow as pa

    where = (("tick", pa.int64()), ("site", pa.string()), ("seed", pa.int32()), ("branch", pa.int32()))
    words = [(name, pa.string()) for name in ("source", "target", "cause")]
    grown = (("generation", pa.int32()), *((name, pa.string()) for name in ("blueprint", "strategy", "objective", "why")))
    schema = pa.schema([*where, *words, *grown])
    return _table(
        schema,
        messages,
        source=lambda m: Stage(m.source).name,
        target=lambda m: Stage(m.target).name,
        why=lambda m: json.dumps(m.why) if m.why else "",
    )


def gates(messages: list[GateResult]) -> pa.Table:
    """One row an answer of a gate."""
    import pyarrow as pa

    names = (
        ("tick", pa.int64()),
        ("site", pa.string()),
        ("seed", pa.int32()),
        ("branch", pa.int32()),
        ("gate", pa.string()),
    )
    values = (("value", pa.float64()), ("threshold", pa.float64()), ("passed", pa.bool_()), ("look", pa.int32()))
    return _table(pa.schema([*names, *values]), messages)


def metrics(messages: list[Metrics]) -> pa.Table:
    """One row a value: tick, name, value."""
    import pyarrow as pa

    flat = [(message.tick, name, value) for message in messages for name, value in message.values.items()]
    tick, name, value = zip(*flat, strict=True) if flat else ((), (), ())
    return pa.table(
        {
            "tick": pa.array(tick, pa.int64()),
            "name": pa.array(name, pa.string()),
            "value": pa.array(value, pa.float64()),
        }
    )


def _table(schema: pa.Schema, messages: list[Any], **readable: Callable[[Any], str]) -> pa.Table:
    import pyarrow as pa

    def column(name: str) -> list[Any]:
        read = readable.get(name)
        return [read(message) if read else getattr(message, name) for message in messages]

    return pa.table({name: column(name) for name in schema.names}, schema=schema)


TABLES: dict[str, Callable[[list[Any]], pa.Table]] = {
    "seeds": seeds,
    "transitions": transitions,
    "gates": gates,
    "metrics": metrics,
}
"""Name of the Parquet file (without ending) → how its rows are made from messages."""
