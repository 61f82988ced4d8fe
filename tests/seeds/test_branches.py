"""The table of branches takes over what it saved, also from before a strategy remembered more."""

from __future__ import annotations

import pytest
import torch

from esper.grafting.state import STATE_WIDTH, column
from esper.lifecycle import Stage
from esper.seeds import Branch, BranchTable


def table() -> BranchTable:
    made = BranchTable()
    for number in range(3):
        made.add(Branch(number, 0, number, number, "mlp", number, 0, "linear", 10, 20, stage=Stage.GRAFTING))
    made.grafting.uniform_(generator=torch.Generator().manual_seed(0))
    return made


def test_columns_that_were_appended_since_are_those_of_a_fresh_branch() -> None:
    saved, again = table().state(), BranchTable()
    again.load(saved | {"grafting": saved["grafting"][:, :-2]})
    assert again.grafting.shape == (3, STATE_WIDTH) and not again.grafting[:, -2:].any()
    assert torch.equal(column(again.grafting, "velocity"), column(saved["grafting"], "velocity"))


def test_a_state_of_other_branches_is_refused() -> None:
    saved = table().state()
    with pytest.raises(ValueError, match="different lengths"):
        BranchTable().load(saved | {"grafting": saved["grafting"][:2]})
    with pytest.raises(ValueError, match="different lengths"):
        BranchTable().load(saved | {"grafting": torch.zeros(3, STATE_WIDTH + 1)})
