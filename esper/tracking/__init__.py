"""Trackers read a run's messages from the bus and write MLflow, CSV, Parquet and figures. See ``docs/tracking.md``."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from esper.tracking.config import CsvConfig, MlflowConfig, NoneConfig, tracking_uri, ui_command
from esper.tracking.run_info import DatasetInfo, RunInfo, differences, flatten, readable_name
from esper.tracking.tracker import Tracker, TrackerError
from esper.tracking.tracker_thread import TrackerRunner
from esper.user_code import CustomTracker

CONFIGS: dict[str, type] = {"mlflow": MlflowConfig, "csv": CsvConfig, "none": NoneConfig}
TrackingConfig = MlflowConfig | CsvConfig | NoneConfig | CustomTracker

__all__ = [
    "CONFIGS",
    "CsvConfig",
    "DatasetInfo",
    "MlflowConfig",
    "NoneConfig",
    "RunInfo",
    "Tracker",
    "TrackerError",
    "TrackerRunner",
    "build_trackers",
    "differences",
    "flatten",
    "prepared_trackers",
    "readable_name",
    "tracking_uri",
    "ui_command",
]


def build_trackers(config: TrackingConfig) -> list[Tracker]:
    """The trackers of a run: the Parquet files always and first, then the one that the settings ask for."""
    from esper.tracking.parquet_files import ParquetFiles

    trackers: list[Tracker] = [ParquetFiles()]
    if isinstance(config, MlflowConfig):
        from esper.tracking.remote import SOCKET, MlflowOverSocket, MlflowSubprocess

        sweep = os.environ.get(SOCKET)  # set in the workers of a sweep, which share one process
        trackers.append(MlflowOverSocket(config, sweep) if sweep else MlflowSubprocess(config))
    elif isinstance(config, CsvConfig):
        from esper.tracking.csv_files import CsvFiles

        trackers.append(CsvFiles(config))
    elif isinstance(config, CustomTracker):
        trackers.append(config.build())
    return trackers


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
