"""``weights.csv``: what the weights came to at every look at the validation set, for a comparison of two runs to find where they part.

A value is the sum of the bits of all weights, read as whole numbers: one pass over them, exact in any order, and another one as soon
as one bit is (but for changes that cancel each other out to the last bit).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from esper.blueprints import SlotBank
from esper.engine.extra_passes import host_buffers, host_parameters
from esper.trainer.trainer import Trainer

NAME, HEADER = "weights.csv", "step,sum"
AS_NUMBERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.int64}
"""What an element of so many bytes is read as."""


class Traced:
    """Called after every step of a life that begins after step ``since`` (−1: anew); what earlier ones noted beyond it goes."""

    def __init__(self, folder: Path, since: int) -> None:
        self.path = folder / NAME
        kept = {step: value for step, value in noted(folder).items() if step <= since}
        text = "".join(f"{line}\n" for line in (HEADER, *(f"{step},{value}" for step, value in kept.items())))
        temporary = folder / f".{NAME}.tmp"
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(self.path)

    def __call__(self, trainer: Trainer) -> None:
        """Note the weights where the validation set was looked at after this step; on its way to the disk when this returns."""
        step = trainer.outcome.steps
        if trainer.validates(step):
            with self.path.open("a", encoding="utf-8") as file:
                file.write(f"{step},{summed(_weights(trainer))}\n")


def noted(folder: Path) -> dict[int, str]:
    """Value by step, as far as it is whole; none where nothing was noted."""
    path = folder / NAME
    if not path.exists():
        return {}
    lines = [line.split(",") for line in path.read_text(encoding="utf-8", errors="replace").splitlines()[1:]]
    return {int(line[0]): line[1] for line in lines if len(line) == 2 and line[0].isdigit() and len(line[1]) == 32}


def summed(tensors: Iterable[Tensor]) -> str:
    """A digest of the tensors' sums of bits, in their order; waits for the device once."""
    with torch.no_grad():
        sums = [_numbers(tensor).sum(dtype=torch.int64) for tensor in tensors]
        values = torch.stack(sums).tolist() if sums else []
    return hashlib.sha256(str(values).encode()).hexdigest()[:32]


def _numbers(tensor: Tensor) -> Tensor:
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(AS_NUMBERS[flat.element_size()])


def _weights(trainer: Trainer) -> Iterable[Tensor]:
    """Host and norm statistics by name, then the living branches."""
    registry = trainer.grow.registry
    for found in (host_parameters(registry.model), host_buffers(registry.model)):
        yield from (found[name].to(trainer.device) for name in sorted(found))
    for branch in registry.branches.living():
        bank = registry.layers[branch.site].bank(branch.blueprint)
        if isinstance(bank, SlotBank):
            yield from (bank.stacks[name][branch.slot] for name in sorted(bank.stacks))
        else:
            yield from bank.blocks[str(branch.slot)].state_dict().values()
