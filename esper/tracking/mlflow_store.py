"""The store behind an MLflow run: client, experiment, system metrics, model."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from esper.errors import UserError

if TYPE_CHECKING:
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor
    from mlflow.tracking import MlflowClient

SQLITE = "sqlite:///"
KIND = {"mlflow.experimentKind": "custom_model_development"}  # or MLflow's page opens on prompts, traces and judges
WAIT_S = 60  # a sweep's processes share one sqlite file, each waits its turn


def quiet_client(uri: str) -> MlflowClient:
    """A client of the store at ``uri`` that prints nothing and calls nobody.

    Raises UserError for a folder: MLflow 3 no longer writes those.
    """
    if "://" not in uri or uri.startswith("file:"):
        raise UserError(f"tracking.uri={uri} is a folder; give sqlite:///<absolute path>.db or http(s)://<server>")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    if uri.startswith(SQLITE):
        Path(uri.removeprefix(SQLITE)).parent.mkdir(parents=True, exist_ok=True)
    import mlflow  # noqa: F401  its import sets up logging, which is then turned down
    from mlflow.tracking import MlflowClient

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    with _alone(uri):  # two processes must not both create the tables
        return MlflowClient(_patient(uri))


def _patient(uri: str) -> str:
    return f"{uri}?timeout={WAIT_S}" if uri.startswith(SQLITE) and "?" not in uri else uri


@contextlib.contextmanager
def _alone(uri: str) -> Iterator[None]:
    """Hold the lock file beside a sqlite store."""
    if not uri.startswith(SQLITE):
        yield
        return
    with open(uri.removeprefix(SQLITE) + ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def experiment_id(client: MlflowClient, uri: str, name: str) -> str:
    """The experiment ``name``, made when absent; beside a sqlite store its artifacts lie in ``mlflow-artifacts``."""
    with _alone(uri):
        found = client.get_experiment_by_name(name)
        if found is not None:
            return found.experiment_id
        place = None
        if uri.startswith(SQLITE):
            place = (Path(uri.removeprefix(SQLITE)).resolve().parent / "mlflow-artifacts").as_uri()
        return client.create_experiment(name, artifact_location=place, tags=KIND)


def start_monitor(run_id: str, uri: str, interval_s: float, *, resumed: bool) -> SystemMetricsMonitor | None:
    """MLflow's own system metrics every ``interval_s`` seconds, or None for 0."""
    if interval_s <= 0:
        return None
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    monitor = SystemMetricsMonitor(run_id, interval_s, resume_logging=resumed, tracking_uri=_patient(uri))
    monitor.start()
    return monitor


def log_model(uri: str, run_id: str, program: Path, sample: Path) -> None:
    """Log an exported program with the signature that ``sample`` shows; loadable without this package's code.

    The requirements are stated: finding them out would take MLflow half a minute in a fresh process.
    """
    import mlflow
    import mlflow.pytorch
    import numpy as np
    import torch
    from mlflow.models import ModelSignature

    from esper.program import open_shapes, quiet

    inputs = np.load(sample, allow_pickle=False)
    loaded = torch.export.load(program)
    module, shapes = loaded.module(), open_shapes(loaded)
    with torch.no_grad():
        outputs = module(torch.from_numpy(inputs)).numpy()
    signature = ModelSignature(*(_schema(values, shape) for values, shape in zip((inputs, outputs), shapes, strict=True)))
    needed = [f"torch=={torch.__version__.split('+')[0]}", f"numpy=={np.__version__}", f"mlflow=={mlflow.__version__}"]
    mlflow.set_tracking_uri(_patient(uri))
    with mlflow.start_run(run_id=run_id), quiet():
        mlflow.pytorch.log_model(
            module,
            name="model",
            signature=signature,  # MLflow traces the program once more, and keeps open the sizes that are open here
            input_example=inputs[:8],
            pip_requirements=needed,
        )


def _schema(values: Any, shape: tuple[int, ...]) -> Any:
    from mlflow.types import Schema, TensorSpec

    return Schema([TensorSpec(values.dtype, shape)])


def warm() -> None:
    """Import what the end of a run needs, while there is time."""
    import matplotlib.figure  # noqa: F401
    import mlflow.pytorch  # noqa: F401
    import torch.export

    torch.export.export(torch.nn.Linear(1, 1), (torch.zeros(2, 1),), dynamic_shapes=({0: torch.export.Dim.AUTO},))
