"""What is kept of a run: trackers read the bus and write MLflow, CSV, Parquet and figures. See ``docs/tracking.md``."""

from __future__ import annotations

import os

from esper.tracking.config import CsvConfig, MlflowConfig, NoneConfig, tracking_uri, ui_command
from esper.tracking.record import DatasetRecord, RunRecord, differences, flatten, readable_name
from esper.tracking.runner import TrackerRunner
from esper.tracking.tracker import Tracker, TrackerError

CONFIGS = {"mlflow": MlflowConfig, "csv": CsvConfig, "none": NoneConfig}

__all__ = [
    "CONFIGS",
    "CsvConfig",
    "DatasetRecord",
    "MlflowConfig",
    "NoneConfig",
    "RunRecord",
    "Tracker",
    "TrackerError",
    "TrackerRunner",
    "build_trackers",
    "differences",
    "flatten",
    "readable_name",
    "tracking_uri",
    "ui_command",
]


def build_trackers(config: MlflowConfig | CsvConfig | NoneConfig) -> list[Tracker]:
    """The trackers of a run: the Parquet files always and first, then what the settings ask for."""
    from esper.tracking.parquet import ParquetFiles

    trackers: list[Tracker] = [ParquetFiles()]
    if isinstance(config, MlflowConfig):
        from esper.tracking.apart import MlflowApart
        from esper.tracking.shared import SOCKET, MlflowShared

        sweep = os.environ.get(SOCKET)  # set in the workers of a sweep, which share one process
        trackers.append(MlflowShared(config, sweep) if sweep else MlflowApart(config))
    elif isinstance(config, CsvConfig):
        from esper.tracking.csv_files import CsvFiles

        trackers.append(CsvFiles(config))
    return trackers
