"""The optimizer state that copies of the host's blocks begin with, and the moment at which shared weights become copies."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from esper.blueprints import BlockBank
from esper.engine.learning.muon import MuonAdamW
from esper.errors import UserError
from esper.messages import Alert
from esper.seeds import Branch

if TYPE_CHECKING:
    from esper.engine.learning.branch_rows import BranchLearning
    from esper.engine.transitions import Transitions

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


class Untying:
    """Gives blocks that share the host's weights a copy of their own, ``after`` ticks of blending (None: never)."""

    def __init__(self, transitions: Transitions, after: int | None) -> None:
        self.transitions = transitions
        self.after = after

    def run(self, tick: int) -> None:
        """Untie every branch that is due; the forward stays what it is."""
        if self.after is None:
            return
        registry = self.transitions.registry
        for branch in registry.branches.living():
            bank = registry.layers[branch.site].bank(branch.blueprint)
            began = _blended_since(branch)
            if isinstance(bank, BlockBank) and str(branch.slot) in bank.tied and began is not None and tick >= began + self.after:
                self._untie(branch, bank, tick)

    def _untie(self, branch: Branch, bank: BlockBank, tick: int) -> None:
        registry = self.transitions.registry
        bank.untie(branch.slot)
        inherit(bank, branch.slot, self.transitions.optimizer)
        branch.parameters = bank.parameters_of(branch.slot)
        registry.touch(branch.site)
        site = registry.sites[branch.site].name
        text = f"branch {branch.id} at {site} has a copy of its own of the weights that it shared: {branch.parameters} parameters more"
        self.transitions.port.emit(Alert(tick=tick, level="info", code="untied", text=text, site=site, seed=branch.seed))


def _blended_since(branch: Branch) -> int | None:
    return next((tick for stage, tick in branch.path if stage == "GRAFTING"), None)
