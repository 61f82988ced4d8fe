"""TensorBoard's event files: every folder with one is a run, its hyperparameters are those of the HParams plugin or ``hparams.yaml``."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from esper.compare.sources.table import METRIC, NAME, PARAM, RUN, SECONDS, START, RunsTable
from esper.extras import import_extra
from esper.tracking.run_info import flatten

if TYPE_CHECKING:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

EVENTS = "*tfevents*"
HPARAMS = "hparams.yaml"  # Lightning writes one beside the events
SESSION = "_hparams_/session_start_info"


def has_events(folder: Path) -> bool:
    """Whether there is an event file in or below the folder."""
    return next(folder.rglob(EVENTS), None) is not None


def tensorboard_runs(folder: Path) -> RunsTable:
    """Every run below a folder of logs, named by its path from there.

    Raises:
        UserError: TensorBoard, whose reader is used, is not installed.
    """
    import pandas as pd

    event_accumulator = import_extra(
        "tensorboard.backend.event_processing.event_accumulator", "Reading event files", "tensorboard", package="tensorboard"
    )
    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    rows: list[dict[str, Any]] = []
    values: list[tuple[str, str, int, float]] = []
    for place in sorted({path.parent for path in folder.rglob(EVENTS)}):
        run = str(place.relative_to(folder)) if place != folder else place.resolve().name
        loaded = event_accumulator.EventAccumulator(str(place), size_guidance={event_accumulator.SCALARS: 0, event_accumulator.TENSORS: 0})
        loaded.Reload()
        row: dict[str, Any] = {RUN: run, NAME: run}
        row |= {PARAM + name: value for name, value in (_yaml(place / HPARAMS) | _hparams(loaded)).items()}
        times = []
        for tag, time, step, value in _scalars(loaded):
            row[METRIC + tag] = value
            values.append((run, METRIC + tag, step, value))
            times.append(time)
        row |= {START: min(times), SECONDS: max(times) - min(times)} if times else {}
        rows.append(row)
    whole = pd.DataFrame(values, columns=["run", "metric", "step", "value"])
    return RunsTable(pd.DataFrame(rows), str(folder), lambda name: whole.loc[whole["metric"] == name, ["run", "step", "value"]])


def _scalars(loaded: EventAccumulator) -> Iterator[tuple[str, float, int, float]]:
    """Name, time, step and value of every scalar, as torch (a value) and TensorFlow 2 (a tensor) write it."""
    from tensorboard.util import tensor_util

    tags = loaded.Tags()
    for tag in tags["scalars"]:
        for event in loaded.Scalars(tag):
            yield tag, event.wall_time, event.step, float(event.value)
    for tag in tags["tensors"]:
        for event in loaded.Tensors(tag):
            array = tensor_util.make_ndarray(event.tensor_proto)
            if array.size == 1 and array.dtype.kind in "fiu":
                yield tag, event.wall_time, event.step, float(array.reshape(-1)[0])


def _hparams(loaded: EventAccumulator) -> dict[str, Any]:
    """What the HParams plugin keeps of a run's hyperparameters."""
    from tensorboard.plugins.hparams import plugin_data_pb2

    try:
        content = loaded.PluginTagToContent("hparams").get(SESSION)
    except KeyError:  # no such plugin in these files
        return {}
    if content is None:
        return {}
    session = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info
    return {name: getattr(value, value.WhichOneof("kind")) for name, value in session.hparams.items() if value.WhichOneof("kind")}


def _yaml(path: Path) -> dict[str, Any]:
    import yaml

    if not path.exists():
        return {}
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError:  # with Python's own tags, which nothing here builds
        return {}
    return flatten(found) if isinstance(found, dict) else {}
