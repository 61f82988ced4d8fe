"""A recorded run as the messages that its controller heard, tick by tick, from the files that it left."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from esper.controllers.bandit import LOSS
from esper.errors import UserError
from esper.lifecycle.stages import Stage
from esper.messages import GateResult, Message, Metrics, RunStarted, Telemetry, Transition
from esper.tracking.parquet_files import STARTED
from esper.tracking.recorded_tables import read_recorded

FILES = ("seeds.parquet", "transitions.parquet", "gates.parquet", "metrics.parquet", STARTED, "summary.json")
"""What of a run is read."""
MEASURES = ("alpha", "variance", "near_zero", "correlation", "grad_norm")
"""The columns of telemetry by which a policy sees."""
Tick = tuple[int, list[Message], list[Message]]
"""A tick, what happened in it, and the telemetry at its end, after which the controller decided."""


def started(folder: Path) -> RunStarted:
    """The start of the run in ``folder``: its sites, every seed DORMANT. Raises UserError where the run did not keep it."""
    path = folder / STARTED
    try:
        said = json.loads(path.read_bytes())
        sites = [{key: value for key, value in site.items() if key != "stages"} for site in said["sites"]]
        return msgspec.convert({"tick": 0, "total_ticks": said["total_ticks"], "sites": sites}, RunStarted)
    except FileNotFoundError as error:
        raise UserError("it has no started.json, which names its sites; earlier versions of esper left none") from error
    except (OSError, ValueError, KeyError, TypeError, msgspec.ValidationError) as error:
        raise UserError(f"its {STARTED} is damaged") from error


def ticks(folder: Path) -> Iterator[Tick]:
    """All of the run, in the order in which its controller heard it: the metrics of a tick come after the decision of that tick.

    Raises:
        UserError: a table that cannot be read, or a run without telemetry or validation loss.
    """
    tables = {name: read_recorded(folder, name) for name in ("transitions", "gates", "metrics")}
    seeds = read_recorded(folder, "seeds", ["tick", "site", "seed", *MEASURES])
    if not len(seeds):
        raise UserError("it has no telemetry")
    events: dict[int, list[Message]] = {}
    for tick, values in _metrics(tables["metrics"]).items():
        events.setdefault(tick + 1, []).append(Metrics(tick=tick, values=values))
    if not any(LOSS in one.values for found in events.values() for one in found if isinstance(one, Metrics)):
        raise UserError(f"it measured no {LOSS}, by which branches are paid")
    for row in tables["gates"].to_pylist():
        events.setdefault(row["tick"], []).append(GateResult(**row))
    for row in tables["transitions"].to_pylist():
        events.setdefault(row["tick"], []).append(_transition(row))
    telemetry = _telemetry(seeds)
    for tick in sorted({*events, *telemetry}):
        yield tick, events.get(tick, []), telemetry.get(tick, [])


def _metrics(table: Any) -> dict[int, dict[str, float]]:
    found: dict[int, dict[str, float]] = {}
    for row in table.to_pylist():
        found.setdefault(row["tick"], {})[row["name"]] = row["value"]
    return found


def _transition(row: dict[str, Any]) -> Transition:
    stages = {key: int(Stage[row[key]]) for key in ("source", "target")}
    return Transition(**(row | stages | {"why": json.loads(row["why"]) if row["why"] else {}}))


def _telemetry(table: Any) -> dict[int, list[Message]]:
    """Rows of a site at a tick, in the order of seeds, as one message."""
    import pyarrow as pa
    import pyarrow.compute as pc

    site = pc.cast(table["site"], pa.string())
    names = sorted(set(site.unique().to_pylist()))
    code = pc.index_in(site, value_set=pa.array(names)).to_numpy()
    tick, seed = table["tick"].to_numpy(), table["seed"].to_numpy()
    order = np.lexsort((seed, code, tick))
    values = np.column_stack([table[name].to_numpy() for name in MEASURES]).astype("<f4")[order]
    tick, code = tick[order], code[order]
    cuts = np.flatnonzero((np.diff(tick) != 0) | (np.diff(code) != 0)) + 1
    found: dict[int, list[Message]] = {}
    for begin, end in zip([0, *cuts.tolist()], [*cuts.tolist(), len(tick)], strict=True):
        at = int(tick[begin])
        message = Telemetry(site=names[code[begin]], ticks=[at], seeds=end - begin, columns=[*MEASURES], data=values[begin:end].tobytes())
        found.setdefault(at, []).append(message)
    return found
