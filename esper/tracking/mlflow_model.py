"""The final model in MLflow: the exported program as it lies in the run's folder, described so that MLflow loads and serves it.

MLflow's own ``mlflow.pytorch.log_model`` would import torch, trace the program once more and try it: five seconds for the same
files. The layout is that of https://mlflow.org/docs/latest/ml/model/ and of the flavour ``pytorch`` with a program of torch.export.
"""

from __future__ import annotations

import json
import platform
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from esper.tracking.final_model import PROGRAM, SAMPLE, SIGNATURE

if TYPE_CHECKING:
    from mlflow.models import Model, ModelSignature
    from mlflow.tracking import MlflowClient

DATA = "data"
FILE = "model.pt2"  # where mlflow.pytorch.load_model looks for it
EXAMPLE = "input_example.json"
NEEDED = ("torch", "numpy", "mlflow")


def log_model(client: MlflowClient, experiment: str, run_id: str, folder: Path) -> None:
    """Log the program that ``write_model`` left in ``folder``, with the signature that its sample shows."""
    from mlflow.entities import LoggedModelOutput, LoggedModelStatus
    from mlflow.models import Model

    logged = client.create_logged_model(experiment, name="model", source_run_id=run_id)
    status = LoggedModelStatus.FAILED
    try:
        model = Model(artifact_path=logged.artifact_location, run_id=run_id, model_uuid=logged.model_id, model_id=logged.model_id)
        with tempfile.TemporaryDirectory(prefix="esper-") as place:
            _write(model, folder, Path(place))
            client.log_model_artifacts(logged.model_id, place)
        client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=0)])
        status = LoggedModelStatus.READY
    finally:
        client.finalize_logged_model(logged.model_id, status)


def _write(model: Model, folder: Path, target: Path) -> None:
    """The files of an MLflow model, with ``model``'s own description, into ``target``."""
    import mlflow.pyfunc
    import numpy as np

    (target / DATA).mkdir()
    shutil.copyfile(folder / PROGRAM, target / DATA / FILE)
    inputs = np.load(folder / SAMPLE, allow_pickle=False)
    model.signature = _signature(folder)
    (target / EXAMPLE).write_text(json.dumps(inputs.tolist()), encoding="utf-8")
    model.saved_input_example_info = {"artifact_path": EXAMPLE, "type": "ndarray"}
    model.add_flavor("pytorch", model_data=DATA, pytorch_version=version("torch"), code=None)
    mlflow.pyfunc.add_to_model(
        model, loader_module="mlflow.pytorch", data=DATA, conda_env="conda.yaml", python_env="python_env.yaml",
        model_config={"device": None}, pickle_module_name="mlflow.pytorch.pickle_module",
    )  # fmt: skip
    _write_environment(target)
    model.save(str(target / "MLmodel"))


def _signature(folder: Path) -> ModelSignature:
    import numpy as np
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    said = json.loads((folder / SIGNATURE).read_text(encoding="utf-8"))
    sides = [[TensorSpec(np.dtype(one["dtype"]), tuple(one["shape"])) for one in said[side]] for side in ("inputs", "outputs")]
    return ModelSignature(*(Schema(side) if side else None for side in sides))


def _write_environment(target: Path) -> None:
    """What the model needs, stated: finding it out would take MLflow half a minute in a fresh process."""
    import yaml

    needed = [f"{name}=={version(name).split('+')[0]}" for name in NEEDED]
    python = platform.python_version()
    (target / "requirements.txt").write_text("\n".join(needed) + "\n", encoding="utf-8")
    plain = {"python": python, "build_dependencies": ["pip", "setuptools", "wheel"], "dependencies": ["-r requirements.txt"]}
    conda = {"name": "mlflow-env", "channels": ["conda-forge"], "dependencies": [f"python={python}", "pip", {"pip": needed}]}
    for name, content in (("python_env.yaml", plain), ("conda.yaml", conda)):
        (target / name).write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
