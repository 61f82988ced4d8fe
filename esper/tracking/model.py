"""The final model on disk, free of pickled code: a torch.export program and a batch that it takes."""

from __future__ import annotations

import copy
import io
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from esper.tracking.tracker import TrackerError

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.export import ExportedProgram

PROGRAM = "model/model.pt2"
SAMPLE = "model/sample.npy"
OUTPUT = "model/output.npy"  # what the model says to the sample, where that is one tensor


def save_program(program: ExportedProgram, path: Path) -> None:
    """``torch.export.save`` by way of memory: told to write the file itself, it ends the process where a disk is full."""
    import torch

    archive = io.BytesIO()
    torch.export.save(program, archive)
    path.write_bytes(archive.getbuffer())


def write_model(model: nn.Module, sample: Tensor, folder: str | Path) -> None:
    """Export ``model`` for any batch size and store it with ``sample`` (batch first) under ``folder``.

    The model is copied to the CPU in evaluation mode and left as it was. Raises TrackerError when it cannot be traced.
    """
    import numpy as np
    import torch

    target = Path(folder)
    (target / PROGRAM).parent.mkdir(parents=True, exist_ok=True)
    sample = sample.detach().cpu()
    if len(sample) == 1:  # torch.export would fix a batch of one for good
        sample = torch.cat([sample, sample])
    plain = copy.deepcopy(model).cpu().eval()
    try:
        with torch.no_grad():
            shapes = ({0: torch.export.Dim.AUTO},)
            program = torch.export.export(plain, (sample,), dynamic_shapes=shapes)
            output = plain(sample)
    except Exception as error:  # torch.export has no common base for what it raises
        why = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
        raise TrackerError(
            f"the final model cannot be exported by torch.export ({why}); set tracking.model=false to do without"
        ) from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch remarks on its own archive of shared storages
        save_program(program, target / PROGRAM)
    np.save(target / SAMPLE, sample.numpy())
    if isinstance(output, torch.Tensor):
        np.save(target / OUTPUT, output.numpy())
