"""Every controller's settings: bound to their files, built, and refused in words."""

from __future__ import annotations

import subprocess
import sys

import pytest

from esper.controllers import CONFIGS, Controller
from esper.controllers.base import command_id
from esper.errors import UserError
from esper.messages import Message
from tests.controllers.policies import saved


@pytest.mark.parametrize("name", CONFIGS)
def test_a_controller_says_nothing_before_it_has_heard_of_a_run(name, tmp_path):
    controller: Controller = CONFIGS[name](**({"weights": saved(tmp_path)} if name == "policy" else {})).build(0)
    controller.observe(Message())
    assert controller.decide(0) == []
    assert controller.decide(10_000) == []


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (CONFIGS["random"](earliest="2epoch"), "'2epoch' tells it nothing"),
        (CONFIGS["heuristic"](plateau="soon"), "'soon' is no duration"),
        (CONFIGS["heuristic"](germinate_at=""), "both empty"),
    ],
)
def test_settings_that_mean_nothing_are_refused_when_it_is_built(config, text):
    with pytest.raises(UserError, match=text):
        config.build(0)


def test_a_commands_id_is_the_same_when_it_is_decided_again():
    assert command_id(7, 2) == "controller-7-2"


@pytest.mark.usefixtures("processes")
def test_controllers_know_no_trainer():
    code = (
        "import sys, esper.controllers; "
        "print([m for m in sys.modules if m.startswith(('esper.engine', 'esper.seeds', 'esper.grafting', 'mlflow'))])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
