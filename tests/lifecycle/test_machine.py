"""The whole table of transitions, the ages, and the ways out of every stage."""

from __future__ import annotations

import itertools

import pytest
import torch

from esper.lifecycle import Ages, LifecycleConfig, Machine, SeedTable, Stage, resolve
from esper.lifecycle.ages import TIMEOUT
from esper.lifecycle.transitions import NO_MINIMUM_AGE

S = Stage
#: design.md, Stages, row by row.
ALLOWED = {
    S.DORMANT: "GERMINATED",
    S.GERMINATED: "TRAINING CANCELLED",
    S.TRAINING: "GRAFTING CULLED CANCELLED ROLLED_BACK",
    S.GRAFTING: "STABILIZATION CULLED ROLLED_BACK",
    S.STABILIZATION: "EVALUATING ROLLED_BACK",
    S.EVALUATING: "FINE_TUNING CULLED ROLLED_BACK",
    S.FINE_TUNING: "FOSSILIZED CULLED ROLLED_BACK",
    S.FOSSILIZED: "",
    S.CULLED: "DORMANT",
    S.CANCELLED: "DORMANT",
    S.ROLLED_BACK: "DORMANT",
}
MATRIX = [(source, target, target.name in ALLOWED[source].split()) for source, target in itertools.product(S, S)]


def ages() -> Ages:
    return resolve(LifecycleConfig(), "5%", "1%", 1000, 100)


def machine(stage: Stage, age: int, rows: int = 1, **settings: int) -> Machine:
    table = SeedTable(rows)
    table.stage.fill_(int(stage))
    table.age.fill_(age)
    return Machine(table, ages(), **settings)


def test_the_stages_are_coded_in_the_order_of_the_document():
    assert [stage.name for stage in Stage] == [stage.name for stage in ALLOWED]
    assert [int(stage) for stage in Stage] == list(range(11))
    assert len(MATRIX) == 121


@pytest.mark.parametrize(("source", "target", "allowed"), MATRIX, ids=lambda value: getattr(value, "name", str(value)))
def test_old_enough_a_seed_may_go_where_the_table_says_and_nowhere_else(source: Stage, target: Stage, allowed: bool):
    subject = machine(source, age=10_000)
    reason = subject.refusal(0, target)
    assert (reason is None) == allowed
    if allowed:
        change = subject.apply(0, target, "because")
        assert (change.row, change.source, change.target, change.cause) == (0, source, target, "because")
        table = subject.table
        assert (table.stage_of(0), int(table.age[0])) == (target, 0)
    else:
        assert source.name in reason and target.name in reason
        before = subject.table.state()
        with pytest.raises(ValueError, match=target.name):
            subject.apply(0, target, "")
        assert all(torch.equal(before[k].nan_to_num(), subject.table.columns[k].nan_to_num()) for k in before)


@pytest.mark.parametrize(("source", "target"), [(s, t) for s, t, allowed in MATRIX if allowed])
def test_a_stage_is_not_left_before_its_minimum_age_unless_by_cancel_or_rollback(source: Stage, target: Stage):
    least = ages().maximum[source] if target is S.DORMANT else ages().minimum.get(source, 0)
    exempt = target in NO_MINIMUM_AGE or source is S.DORMANT
    if least > 0 and not exempt:
        assert str(least) in machine(source, least - 1).refusal(0, target)
    assert machine(source, least).refusal(0, target) is None
    if exempt:
        assert machine(source, 0).refusal(0, target) is None


@pytest.mark.parametrize("stage", [s for s in S if s not in (S.DORMANT, S.FOSSILIZED)])
def test_every_stage_but_two_is_left_at_its_maximum_age_and_not_before(stage: Stage):
    most = ages().maximum[stage]
    assert most >= max(1, ages().minimum[stage])
    subject = machine(stage, 0)
    for age in range(1, most + 1):
        assert subject.outlived() == [], age
        subject.advance()
    assert subject.outlived() == [(0, TIMEOUT[stage])]
    assert TIMEOUT[stage].name in ALLOWED[stage].split()


@pytest.mark.parametrize("stage", [S.DORMANT, S.FOSSILIZED])
def test_dormant_and_fossilized_seeds_do_not_age(stage: Stage):
    subject = machine(stage, 0)
    for _ in range(3000):
        subject.advance()
    assert int(subject.table.age[0]) == 0 and subject.outlived() == []


def test_a_fossil_may_be_seeded_again_only_where_the_config_says_so():
    assert machine(S.FOSSILIZED, 0).refusal(0, S.GERMINATED)
    subject = machine(S.FOSSILIZED, 0, reseed=True)
    assert subject.refusal(0, S.GERMINATED) is None
    assert subject.refusal(0, S.DORMANT)
    subject.apply(0, S.GERMINATED, "")
    assert int(subject.table.generation[0]) == 1


def test_training_slots_are_a_limit():
    subject = machine(S.GERMINATED, 5, rows=3, training_slots=2)
    for row in (0, 1):
        assert subject.refusal(row, S.TRAINING) is None
        subject.apply(row, S.TRAINING, "")
    assert "training slots" in subject.refusal(2, S.TRAINING)


def test_a_row_that_is_not_there_is_refused_with_the_rows_there_are():
    assert "0 to 2" in machine(S.DORMANT, 0, rows=3).refusal(3, S.GERMINATED)
    assert machine(S.DORMANT, 0).refusal(-1, S.GERMINATED) is not None


def test_germinating_begins_a_new_generation_with_a_clean_record():
    subject = machine(S.DORMANT, 0)
    table = subject.table
    table.looks[0], table.errors[0], table.score[0], table.generation[0] = 4, 2, 0.5, 6
    subject.apply(0, S.GERMINATED, "")
    assert (int(table.generation[0]), int(table.looks[0]), int(table.errors[0])) == (7, 0, 0)
    assert table.score[0] != table.score[0]


def test_the_table_keeps_its_rows_and_counts_them():
    table = SeedTable(5)
    table.stage[2] = int(S.TRAINING)
    assert table.counts()["TRAINING"] == 1 and table.counts()["DORMANT"] == 4
    assert table.rows_in(S.TRAINING, S.CULLED) == [2]
    assert table.bytes_per_seed <= 28
    other = SeedTable(5)
    other.load(table.state())
    assert other.stage_of(2) is S.TRAINING
    table.stage[2] = 0
    assert other.stage_of(2) is S.TRAINING, "a state is a copy"
    with pytest.raises(ValueError, match="5 rows"):
        SeedTable(4).load(table.state())
    with pytest.raises(AttributeError):
        _ = table.no_such_column
