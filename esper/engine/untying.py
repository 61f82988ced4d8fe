"""The moment at which blocks that ran with the host's own weights get a copy of their own."""

from __future__ import annotations

from esper.blueprints import BlockBank
from esper.engine.learning.inheritance import inherit
from esper.engine.transitions import Transitions
from esper.messages import Alert
from esper.seeds import Branch


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
        registry.mark_changed(branch.site)
        site = registry.sites[branch.site].name
        text = f"branch {branch.id} at {site} has a copy of its own of the weights that it shared: {branch.parameters} parameters more"
        self.transitions.port.emit(Alert(tick=tick, level="info", code="untied", text=text, site=site, seed=branch.seed))


def _blended_since(branch: Branch) -> int | None:
    return next((tick for stage, tick in branch.path if stage == "GRAFTING"), None)
