"""A seed remembers its last transitions, and no more of them than it should."""

from __future__ import annotations

import json

import pytest

from esper.lifecycle import Stage
from esper.lifecycle.history import CAUSE, LENGTH, History, Passed, shortened


def passed(tick: int) -> Passed:
    return Passed(tick, Stage.DORMANT, Stage.GERMINATED, tick, f"cause {tick}")


def test_the_oldest_is_forgotten_and_a_seed_that_never_moved_costs_nothing():
    history = History()
    for tick in range(LENGTH + 3):
        history.note(7, passed(tick))
    assert history.of(7) == [passed(tick) for tick in range(3, LENGTH + 3)]
    assert history.of(6) == [] and list(history.rings) == [7]


def test_it_travels_as_plain_values_and_goes_on_bounded():
    history = History()
    for tick in range(LENGTH):
        history.note(0, passed(tick))
    again = History()
    again.load(json.loads(json.dumps(history.state())))
    assert again.rings == history.rings and isinstance(again.of(0)[0].target, Stage)
    again.note(0, passed(99))
    assert len(again.of(0)) == LENGTH


@pytest.mark.parametrize("state", [{"0": [[1, 2, 3]]}, {"0": [[1, 0, 99, 0, ""]]}, {"first": [[1, 0, 1, 0, ""]]}])
def test_what_is_no_state_of_one_is_refused(state: dict[str, list[list[int]]]):
    with pytest.raises(ValueError):
        History().load(state)


def test_a_cause_is_cut():
    assert shortened("why") == "why" and len(shortened("x" * 500)) == CAUSE and shortened("x" * 500).endswith("…")


def test_what_was_copied_is_put_back():
    history = History()
    history.note(1, passed(1))
    before = history.copy([1, 2])
    history.note(1, passed(2))
    history.note(2, passed(2))
    history.put_back(before)
    assert history.of(1) == [passed(1)] and 2 not in history.rings
