"""What a tick of many resting seeds looks at, and transitions that are worked out without being made."""

from __future__ import annotations

import pytest
import torch

from esper.lifecycle import LifecycleConfig, Machine, SeedTable, Stage, resolve


@pytest.fixture
def machine() -> Machine:
    return Machine(SeedTable(1000), resolve(LifecycleConfig(), "5%", "1%", 1000, 100), training_slots=1)


def test_only_seeds_that_neither_rest_nor_stay_for_good_are_looked_at(machine: Machine) -> None:
    table = machine.table
    assert table.aging().tolist() == []
    for row in (700, 3, 5):
        machine.apply(row, Stage.GERMINATED, "")
    assert table.aging().tolist() == [3, 5, 700]
    machine.apply(5, Stage.CANCELLED, "")
    assert table.aging().tolist() == [3, 5, 700]
    machine.apply(5, Stage.DORMANT, "")
    assert table.aging().tolist() == [3, 700]
    machine.advance()
    assert table.age.nonzero().flatten().tolist() == [3, 700]
    assert table.rows_in(Stage.GERMINATED) == [3, 700]


def test_a_stage_that_was_written_by_hand_is_seen(machine: Machine) -> None:
    machine.table.stage[4] = int(Stage.TRAINING)
    assert machine.table.aging().tolist() == [4]
    machine.table.load(SeedTable(1000).state())
    assert machine.table.aging().tolist() == []
    machine.table.stage[torch.tensor([9, 8])] = int(Stage.CULLED)
    assert machine.table.rows_in(Stage.CULLED) == [8, 9]
    assert machine.table.rows_in(Stage.DORMANT, Stage.CULLED) == list(range(1000))


def test_a_trial_sees_its_own_transitions_and_moves_nothing(machine: Machine) -> None:
    before = machine.table.state()
    trial = machine.trial()
    trial.apply(3, Stage.GERMINATED, "")
    assert (trial.stage_of(3), trial.age_of(3)) == (Stage.GERMINATED, 0)
    assert trial.rows_in(Stage.GERMINATED) == [3] and 3 not in trial.rows_in(Stage.DORMANT)
    assert "lasts at least" in str(trial.refusal(3, Stage.TRAINING))
    trial.apply(3, Stage.TRAINING, "")
    with pytest.raises(ValueError, match="FOSSILIZED"):
        trial.apply(3, Stage.FOSSILIZED, "")
    after = machine.table.state()
    assert all(torch.equal(before[name].nan_to_num(), after[name].nan_to_num()) for name in before)


def test_a_trial_counts_the_training_slots_it_gave_away(machine: Machine) -> None:
    machine.apply(4, Stage.GERMINATED, "")
    machine.advance()
    trial = machine.trial()
    assert trial.refusal(4, Stage.TRAINING) is None
    trial.apply(3, Stage.GERMINATED, "")
    trial.apply(3, Stage.TRAINING, "")
    assert "slots are taken" in str(trial.refusal(4, Stage.TRAINING))


def test_a_seed_that_moved_in_a_trial_has_just_arrived_however_long_it_waited(machine: Machine) -> None:
    machine.apply(4, Stage.GERMINATED, "")
    for _ in range(machine.ages.minimum[Stage.TRAINING] + 1):
        machine.advance()
    trial = machine.trial()
    trial.apply(4, Stage.TRAINING, "")
    assert trial.age_of(4) == 0
    assert "lasts at least" in str(trial.refusal(4, Stage.GRAFTING))
