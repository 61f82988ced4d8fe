"""Settings of group ``tracking``: where a run is recorded besides its own folder."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from esper.processes import TrackerPlace, chosen
from esper.setting_fields import setting

SQLITE = "sqlite:///"


@dataclass
class NoneConfig(TrackerPlace):
    """The Parquet files of the run's folder and nothing else."""

    name: str = "none"
    trackers: dict[str, Any] = chosen("none")


@dataclass
class CsvConfig(TrackerPlace):
    """``metrics.csv`` and ``events.jsonl`` in the run's folder."""

    name: str = "csv"
    trackers: dict[str, Any] = chosen("csv")
    figures: bool = setting(True, help="draw the figures at the end of the run")


@dataclass
class MlflowConfig(TrackerPlace):
    """An MLflow run for every run, written by its own process."""

    name: str = "mlflow"
    trackers: dict[str, Any] = chosen("mlflow")
    uri: str = setting("", help="tracking URI; empty: sqlite in mlflow.db of the outputs folder")
    experiment: str = setting("esper", help="MLflow experiment that the run belongs to")
    figures: bool = setting(True, help="draw the figures at the end of the run and log them")
    model: bool = setting(True, help="log the final model with its signature")
    points: int = setting(500, low=2, high=100_000, help="values a per-site aggregate gets over the run, at most")
    system_s: float = setting(5.0, low=0.0, high=3600.0, unit="s", help="interval of system metrics; 0: none")
    close_s: float = setting(120.0, low=1.0, unit="s", help="how long the end of a run waits for the tracker")


@dataclass
class TensorBoardConfig(TrackerPlace):
    """Event files in ``tensorboard`` of the run's folder, for ``tensorboard --logdir outputs``."""

    name: str = "tensorboard"
    trackers: dict[str, Any] = chosen("tensorboard")
    figures: bool = setting(True, help="draw the figures at the end of the run and log them as images")
    points: int = setting(500, low=2, high=100_000, help="values a per-site aggregate gets over the run, at most")


@dataclass
class WandbConfig(TrackerPlace):
    """A run in Weights & Biases, on its server or kept offline in ``wandb`` of the run's folder."""

    name: str = "wandb"
    trackers: dict[str, Any] = chosen("wandb")
    project: str = setting("esper", help="W&B project that the run belongs to")
    entity: str = setting("", help="W&B team or user; empty: the one that is logged in")
    mode: str = setting("", choices=("", "online", "offline"), help="empty: WANDB_MODE of the environment, else online")
    figures: bool = setting(True, help="draw the figures at the end of the run and log them as images")
    points: int = setting(500, low=2, high=100_000, help="values a per-site aggregate gets over the run, at most")


@dataclass
class SeveralTrackers(TrackerPlace):
    """What ``tracking=[mlflow,csv]`` makes: the settings of each, by name. A setting that several have is the same in all of them."""

    name: str = "several"
    trackers: dict[str, Any] = setting({})


def trackers_in(config: Any) -> list[Any]:
    """The settings of each tracker of a run, one or several."""
    return list(config.trackers.values()) if isinstance(config, SeveralTrackers) else [config]


def mlflow_in(config: Any) -> MlflowConfig | None:
    """The settings of MLflow; None where it is not among the trackers."""
    return next((one for one in trackers_in(config) if isinstance(one, MlflowConfig)), None)


def tracking_uri(config: MlflowConfig, outputs: str) -> str:
    """The URI in the settings, or sqlite in ``outputs`` (a folder, made absolute)."""
    return config.uri or sqlite_uri(Path(outputs).resolve() / "mlflow.db")


def sqlite_uri(file: Path) -> str:
    """The URI of a store in SQLite.

    SQLAlchemy takes what follows ``?`` for options and ``%`` for the beginning of a code, so these two are written as codes.
    """
    return SQLITE + str(file).replace("%", "%25").replace("?", "%3F")


def sqlite_file(uri: str) -> Path | None:
    """The file of a store in SQLite, None for any other."""
    return Path(unquote(uri.removeprefix(SQLITE).partition("?")[0])) if uri.startswith(SQLITE) else None


def ui_command(uri: str) -> str:
    """The command that shows the runs at ``uri`` in a browser."""
    if uri.startswith(("http://", "https://")):
        return uri
    return f"mlflow ui --backend-store-uri {shlex.quote(uri)}"
