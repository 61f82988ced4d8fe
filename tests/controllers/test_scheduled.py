"""The scripted controller: what each entry sends, when, and how a wrong one is refused."""

from __future__ import annotations

import pytest

from esper.controllers.scheduled import ScheduledConfig
from esper.errors import UserError
from esper.messages import (
    ApplyTogether,
    Cancel,
    ChangeStrategy,
    EmergencyStop,
    PauseGrafting,
    ReplaceBranch,
    RequestReport,
    ResumeGrafting,
    Selector,
    SetStage,
)


def _build(*script):
    return ScheduledConfig(script=list(script)).build(0)


def test_an_entry_is_decided_at_its_time_and_applied_at_the_next_tick_once(run):
    ran = run(_build({"at": "10%", "command": "germinate", "site": "fc1", "seeds": [2]})).start().until(40)
    assert ran.germinated == {11: [("fc1", 2)]}
    assert ran.handed[11][0].id == "controller-10-0"
    assert [(a.command_id, a.status) for a in ran.answers()] == [("controller-10-0", "applied")]


def test_entries_of_the_same_tick_keep_the_order_of_the_script(run):
    later = {"at": "5step", "command": "germinate", "site": "fc2", "seeds": [0]}
    sooner = {"at": "4step", "command": "germinate", "site": "fc2", "seeds": [1]}
    both = run(_build(later, later | {"site": "fc1"}, sooner)).start().until(10)
    assert both.germinated == {5: [("fc2", 1)], 6: [("fc2", 0), ("fc1", 0)]}


def test_a_glob_and_a_count_take_the_first_dormant_seeds(run):
    first = {"at": "1step", "command": "germinate", "site": "fc1", "seeds": [0, 2]}
    more = {"at": "5step", "command": "germinate", "site": "f*", "count": 3, "blueprint": "affine", "strategy": "drift"}
    ran = run(_build(first, more)).start().until(10)
    assert ran.germinated[6] == [("fc1", 1), ("fc1", 3), ("fc2", 0)]
    assert {(c.blueprint, c.strategy) for c in ran.handed[6]} == {("affine", "drift")}


def test_without_seeds_or_count_it_means_all(run):
    ran = run(_build({"at": "1step", "command": "germinate", "site": "fc2"})).start().until(3)
    assert ran.germinated == {2: [("fc2", 0), ("fc2", 1)]}


def test_what_germinates_as_one_is_one_command(run):
    ran = run(_build({"at": "1step", "command": "germinate", "site": "fc2", "as_one": True})).start().until(3)
    (command,) = ran.handed[2]
    assert isinstance(command, ApplyTogether) and command.as_one
    assert [(part.site, part.seed, part.id) for part in command.commands] == [
        ("fc2", 0, "controller-1-0-0"),
        ("fc2", 1, "controller-1-0-1"),
    ]
    assert [answer.status for answer in ran.answers()] == ["applied"]


def test_what_is_named_and_not_there_is_asked_for_so_that_the_trainer_says_why_not(run):
    ran = run(_build({"at": "1step", "command": "germinate", "site": "nowhere", "seeds": [9]})).start().until(3)
    assert [answer.status for answer in ran.answers()] == ["refused"]


def test_every_command_of_a_script(run):
    fc1 = Selector(site="fc1", seeds=[0], stage=3)
    script = [
        {"at": "1step", "command": "set_stage", "site": "fc1", "seeds": [0], "stage": "grafting", "target": 8},
        {"at": "1step", "command": "change_strategy", "site": "fc1", "seeds": [0], "stage": 3, "strategy": "drift"},
        {"at": "1step", "command": "pause", "site": "fc1", "seeds": [0], "stage": 3},
        {"at": "1step", "command": "resume", "site": "fc1", "seeds": [0], "stage": 3},
        {"at": "1step", "command": "cancel", "site": "fc2"},
        {"at": "1step", "command": "report"},
        {"at": "1step", "command": "replace", "site": "fc1", "seeds": [1], "blueprint": "glu"},
        {"at": "2step", "command": "emergency_stop", "site": "fc1", "seeds": [0], "stage": 3},
        {"at": "2step", "command": "emergency_stop", "reason": "enough"},
    ]
    ran = run(_build(*script)).start().until(4)
    assert ran.handed == {
        2: [
            SetStage(id="controller-1-0", select=fc1, target=8),
            ChangeStrategy(id="controller-1-1", select=fc1, strategy="drift"),
            PauseGrafting(id="controller-1-2", select=fc1),
            ResumeGrafting(id="controller-1-3", select=fc1),
            Cancel(id="controller-1-4", select=Selector(site="fc2")),
            RequestReport(id="controller-1-5"),
            ReplaceBranch(id="controller-1-6", site="fc1", seed=1, blueprint="glu"),
        ],
        3: [EmergencyStop(id="controller-2-0", select=fc1), EmergencyStop(id="controller-2-1", reason="enough")],
    }


def test_a_resumed_script_repeats_nothing(run, reborn):
    config = ScheduledConfig(
        script=[{"at": f"{t}step", "command": "germinate", "count": 1} for t in (2, 8)],
    )
    first = run(config.build(0)).start().until(5)
    again = run(reborn(first.runner.controller, config), "again").start(tick=5).until(12)
    assert (first.germinated, again.germinated) == ({3: [("fc1", 0)]}, {9: [("fc1", 1)]})


@pytest.mark.parametrize(
    ("entry", "text"),
    [
        ("germinate", "an entry is a dict with at and command"),
        ({"at": "1step"}, "an entry is a dict with at and command"),
        ({"at": "1step", "command": "grow"}, "command is 'grow'; accepted are germinate, cancel"),
        ({"at": "1step", "command": "report", "site": "fc1"}, "key 'site', which report does not take"),
        ({"at": "1step", "command": "set_stage"}, "lacks 'target'"),
        ({"at": "1step", "command": "change_strategy"}, "lacks 'strategy'"),
        ({"at": "noon", "command": "report"}, "'noon' is no duration"),
        ({"at": "1step", "command": "set_stage", "target": "ripe"}, "target is 'ripe'; accepted are DORMANT"),
        ({"at": "1step", "command": "set_stage", "target": 11}, "target is 11"),
        ({"at": "1step", "command": "germinate", "seeds": "all"}, "seeds is 'all'; give a list"),
    ],
)
def test_an_entry_that_cannot_be_read_is_refused_in_words(entry, text):
    with pytest.raises(UserError, match=text):
        _build(entry)


def test_a_glob_that_matches_no_site_is_refused_with_the_sites_there_are(run):
    ran = run(_build({"at": "50step", "command": "germinate", "site": "conv*"})).start()
    with pytest.raises(UserError, match=r"'conv\*', which match none; there are: fc1, fc2"):
        ran.until(1)
