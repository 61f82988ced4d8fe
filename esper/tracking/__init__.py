"""Trackers read a run's messages from the bus and write MLflow, CSV, Parquet and figures. See ``docs/tracking.md``."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from esper.tracking.config import (
    CsvConfig,
    MlflowConfig,
    NoneConfig,
    SeveralTrackers,
    TensorBoardConfig,
    WandbConfig,
    mlflow_in,
    trackers_in,
    tracking_uri,
    ui_command,
)
from esper.tracking.run_info import DatasetInfo, RunInfo, differences, flatten, readable_name
from esper.tracking.tracker import Tracker, TrackerError
from esper.tracking.tracker_thread import TrackerRunner
from esper.user_code import CustomTracker

CONFIGS: dict[str, type] = {
    "mlflow": MlflowConfig,
    "tensorboard": TensorBoardConfig,
    "wandb": WandbConfig,
    "csv": CsvConfig,
    "none": NoneConfig,
}
TrackingConfig = MlflowConfig | TensorBoardConfig | WandbConfig | CsvConfig | NoneConfig | CustomTracker | SeveralTrackers

__all__ = [
    "CONFIGS",
    "CsvConfig",
    "DatasetInfo",
    "MlflowConfig",
    "NoneConfig",
    "RunInfo",
    "SeveralTrackers",
    "TensorBoardConfig",
    "Tracker",
    "TrackerError",
    "TrackerRunner",
    "WandbConfig",
    "build_trackers",
    "differences",
    "flatten",
    "mlflow_in",
    "prepared_trackers",
    "readable_name",
    "trackers_in",
    "tracking_uri",
    "ui_command",
]


def build_trackers(config: TrackingConfig) -> list[Tracker]:
    """The trackers of a run: the Parquet files always and first, then those that the settings ask for."""
    from esper.tracking.parquet_files import ParquetFiles

    made = [_built(one) for one in trackers_in(config)]
    return [ParquetFiles(), *(tracker for tracker in made if tracker is not None)]


def _built(config: Any) -> Tracker | None:
    if isinstance(config, MlflowConfig):
        from esper.tracking.remote import SOCKET, MlflowOverSocket, MlflowSubprocess

        sweep = os.environ.get(SOCKET)  # set in the workers of a sweep, which share one process
        return MlflowOverSocket(config, sweep) if sweep else MlflowSubprocess(config)
    if isinstance(config, TensorBoardConfig):
        from esper.tracking.tensorboard_events import TensorBoardEvents

        return TensorBoardEvents(config)
    if isinstance(config, WandbConfig):
        from esper.tracking.wandb_run import WandbRun

        return WandbRun(config)
    if isinstance(config, CsvConfig):
        from esper.tracking.csv_files import CsvFiles

        return CsvFiles(config)
    own: Tracker | None = config.build() if isinstance(config, CustomTracker) else None
    return own


@contextmanager
def prepared_trackers(config: TrackingConfig, folder: Path, outputs: Path) -> Iterator[list[Tracker]]:
    """The same for a run that is about to begin. Within, MLflow's process is started; on leaving it has ended."""
    from esper.tracking.remote import MlflowSubprocess

    trackers = build_trackers(config)
    slow = [tracker for tracker in trackers if isinstance(tracker, MlflowSubprocess)]
    try:
        for tracker in slow:
            tracker.prepare(folder, outputs)
        yield trackers
    finally:
        for tracker in slow:
            tracker.let_go()
