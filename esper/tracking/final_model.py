"""The final model on disk, free of pickled code: a torch.export program and a batch that it takes."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from esper.tracking.tracker import TrackerError

if TYPE_CHECKING:
    from torch import Tensor, nn

log = logging.getLogger(__name__)

PROGRAM = "model/model.pt2"
SAMPLE = "model/sample.npy"
SIGNATURE = "model/signature.json"  # dtypes and shapes of what goes in and comes out, -1 for a size that is open


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
    except Exception as error:  # torch.export has no common base for what it raises
        why = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
        raise TrackerError(f"the final model cannot be exported by torch.export ({why}); set tracking.model=false to do without") from error
    for remark in remarks:
        log.warning("%s", remark)
    to_pt2(program, target / PROGRAM)
    with replacing(target / SAMPLE) as aside:
        np.save(aside, sample.numpy())
    with replacing(target / SIGNATURE) as aside:
        aside.write_text(json.dumps(signature_of(program)), encoding="utf-8")
