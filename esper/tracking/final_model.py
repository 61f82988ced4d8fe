"""The final model: as a torch.export program in the run's folder, and from there in MLflow.

The program and a batch that it takes are free of pickled code. MLflow gets them described so that it loads and serves them: its own
``mlflow.pytorch.log_model`` would import torch, trace the program once more and try it: five seconds for the same files. The layout is
that of https://mlflow.org/docs/latest/ml/model/ and of the flavour ``pytorch`` with a program of torch.export.
"""

from __future__ import annotations

import copy
import json
import logging
import platform
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from esper.tracking.tracker import TrackerError

if TYPE_CHECKING:
    from mlflow.models import Model, ModelSignature
    from mlflow.tracking import MlflowClient
    from torch import Tensor, nn

log = logging.getLogger(__name__)

PROGRAM = "model/model.pt2"
SAMPLE = "model/sample.npy"
SIGNATURE = "model/signature.json"  # dtypes and shapes of inputs and outputs, -1 for a size that is open
DATA = "data"
FILE = "model.pt2"  # where mlflow.pytorch.load_model looks for it
EXAMPLE = "input_example.json"
NEEDED = ("torch", "numpy", "mlflow")


def write_model(model: nn.Module, sample: Tensor, folder: str | Path) -> None:
    """Export ``model`` (``esper.export.program``) and store it with ``sample`` (batch first) under ``folder``.

    The model is copied to the CPU in evaluation mode and left as it was. Raises TrackerError when it cannot be traced.
    """
    import numpy as np
    import torch

    from esper.atomic_files import replacing
    from esper.export.program import signature_of, to_pt2, traced

    target = Path(folder)
    (target / PROGRAM).parent.mkdir(parents=True, exist_ok=True)
    sample = sample.detach().cpu().contiguous()
    if len(sample) == 1:  # MLflow traces the program anew with it, which would fix a batch of one for good
        sample = torch.cat([sample, sample])
    try:
        program, remarks = traced(copy.deepcopy(model).cpu().eval(), sample)
    except Exception as error:  # the exceptions of torch.export have no common base
        why = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
        raise TrackerError(f"the final model cannot be exported by torch.export ({why}); set tracking.model=false to do without") from error
    for remark in remarks:
        log.warning("%s", remark)
    to_pt2(program, target / PROGRAM)
    with replacing(target / SAMPLE) as aside:
        np.save(aside, sample.numpy())
    with replacing(target / SIGNATURE) as aside:
        aside.write_text(json.dumps(signature_of(program)), encoding="utf-8")


def log_model(client: MlflowClient, experiment: str, run_id: str, folder: Path) -> None:
    """Log the program that ``write_model`` left in ``folder``, with the signature that its sample shows."""
    from mlflow.entities import LoggedModelOutput, LoggedModelStatus
    from mlflow.models import Model

    logged = client.create_logged_model(experiment, name="model", source_run_id=run_id)
    status = LoggedModelStatus.FAILED
    try:
        model = Model(artifact_path=logged.artifact_location, run_id=run_id, model_uuid=logged.model_id, model_id=logged.model_id)
        with tempfile.TemporaryDirectory(prefix="esper-") as place:
            _write_mlflow_model(model, folder, Path(place))
            client.log_model_artifacts(logged.model_id, place)
        client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=0)])
        status = LoggedModelStatus.READY
    finally:
        client.finalize_logged_model(logged.model_id, status)


def _write_mlflow_model(model: Model, folder: Path, target: Path) -> None:
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
    from mlflow.types import ColSpec, Schema, TensorSpec

    said = json.loads((folder / SIGNATURE).read_text(encoding="utf-8"))

    def schema(side: str) -> Schema | None:
        specs: list[ColSpec | TensorSpec] = [TensorSpec(np.dtype(one["dtype"]), tuple(one["shape"])) for one in said[side]]
        return Schema(specs) if specs else None

    return ModelSignature(schema("inputs"), schema("outputs"))


def _write_environment(target: Path) -> None:
    """State the packages that the model needs: MLflow would take half a minute in a fresh process to find them."""
    import yaml

    needed = [f"{name}=={version(name).split('+')[0]}" for name in NEEDED]
    python = platform.python_version()
    (target / "requirements.txt").write_text("\n".join(needed) + "\n", encoding="utf-8")
    plain = {"python": python, "build_dependencies": ["pip", "setuptools", "wheel"], "dependencies": ["-r requirements.txt"]}
    conda = {"name": "mlflow-env", "channels": ["conda-forge"], "dependencies": [f"python={python}", "pip", {"pip": needed}]}
    for name, content in (("python_env.yaml", plain), ("conda.yaml", conda)):
        (target / name).write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
