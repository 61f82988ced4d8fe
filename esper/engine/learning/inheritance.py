"""The optimizer state that copies of the host's blocks begin with."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from esper.blueprints import BlockBank
from esper.engine.learning.muon import MuonAdamW
from esper.errors import UserError

if TYPE_CHECKING:
    from esper.engine.learning.branch_rows import BranchLearning

ADAMS = (torch.optim.Adam, torch.optim.AdamW, MuonAdamW)


def refuse_uninheritable(state: str, optimizer: torch.optim.Optimizer | None, learning: BranchLearning) -> None:
    """Raise UserError where ``blueprint.state=copied`` finds an optimizer whose state says nothing to the branches' own."""
    if state != "copied":
        return
    muon = isinstance(optimizer, MuonAdamW)
    if isinstance(optimizer, ADAMS) and muon == (learning.rule == "muon"):
        return
    kind = "no optimizer" if optimizer is None else type(optimizer).__name__
    raise UserError(
        f"blueprint.state=copied hands the host's moments on to branches, which learn by {learning.rule}, but the host has {kind}: use the "
        "same kind for both (optimizer=adamw or optimizer=muon), or blueprint.state=reset or zero."
    )


@torch.no_grad()
def inherit(bank: BlockBank, slot: int, optimizer: torch.optim.Optimizer | None) -> None:
    """Give a slot the moments and steps of the host's parameters that it is a copy of, where its blueprint asks for them.

    AdamW's two moments, or Muon's momentum, which lies where AdamW's first moment would. What the optimizer never stepped has none.
    """
    if bank.blueprint.state != "copied" or str(slot) in bank.tied or optimizer is None:
        return
    steps = 0
    for name, original in bank.originals(slot).items():
        held = optimizer.state.get(original, {})
        first, second = bank.moments[str(slot)][name]
        first.copy_(held.get("exp_avg", held.get("momentum_buffer", first)))
        second.copy_(held.get("exp_avg_sq", second))
        steps = max(steps, int(held.get("step", 0)))
    bank.steps[str(slot)] = steps
