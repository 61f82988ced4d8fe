"""What ``esper auto`` takes, and what it decides by itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from esper.auto.config import amount, sorted_words
from esper.auto.moves import LARGER, growth_words, host_for, host_words, kinds_of, larger_host, settings_space, start_words
from esper.errors import UserError
from esper.hosts.config import CNNConfig, MLPConfig
from esper.tasks.config import DigitsConfig
from tests.here import here


@pytest.mark.parametrize(
    ("text", "value", "unit"),
    [("10min", 600.0, "s"), ("2h", 7200.0, "s"), ("90s", 90.0, "s"), ("1e13macs", 1e13, "macs"), ("1.5e9 MACs", 1.5e9, "macs")],
)
def test_a_budget_is_a_time_or_macs(text: str, value: float, unit: str) -> None:
    found = amount(text)
    assert (found.value, found.unit) == (value, unit)


@pytest.mark.parametrize("text", ["", "10", "min", "-3min", "0s", "1e400macs", "ten min", "1e13flops", "1.2.3s"])
def test_anything_else_is_no_budget(text: str) -> None:
    with pytest.raises(UserError, match="give a time or MACs of training"):
        amount(text)


def test_own_words_and_those_of_the_runs_are_told_apart() -> None:
    config, rest = sorted_words(["task=digits", "budget=1h", "max_parameters=1e4", "seed=3", "gain=0.01", "search=0.2"])
    assert (config.budget, config.max_parameters, config.gain, config.search) == ("1h", 10_000, 0.01, 0.2)
    assert rest == ["task=digits", "seed=3"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["task=digits"], "budget=(empty) is not accepted"),
        (["budget=1h", "budget=2h"], "budget is given twice"),
        (["budget=1h", "trainer.steps=10"], "the budget decides how long each run lasts"),
        (["budget=1h", "trainer.checkpoint_every=10step"], "its runs keep no checkpoints"),
        (["budget=1h", "blueprint.hidden=3"], "auto tries every kind of growth"),
        (["budget=1h", "controller=random"], "auto decides when something grows"),
        (["budget=1h", "max_parameters=many"], "esper: max_parameters=many is not accepted"),
        (["budget=1h", "gain=2"], "esper: gain=2.0 is not accepted"),
        (["budget=1h", "-m"], "'-m' is no word of esper auto"),
        (["task=digits", "budgt=1h"], "did you mean budget?"),
        (["budget=1h", "max_params=100"], "did you mean max_parameters?"),
        (["help"], "'help' is no word of esper auto: it takes budget=…"),
        (
            ["budget=1h", "optimizer.lr=0.1,0.2"],
            "optimizer.lr=0.1,0.2 gives optimizer.lr several values, and esper auto makes no sweep: give one.",
        ),
        (["budget=1h", "tracking.figures=false"], "There is no key tracking.figures: tracking=none has"),
        (["budget=1h", "to=/dev/null/here"], "/dev/null/here cannot be made (not a directory); give another: to=…."),
        (["budget=1h", "task=digit"], "did you mean digits"),
        (["budget=1h", "task=folder", "task.path=nowhere"], "task.path=nowhere is no folder"),
    ],
)
def test_words_that_mean_nothing_here_get_a_sentence(
    words: list[str], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = here("auto", *words)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert sentence in done.stderr
    assert not [*tmp_path.iterdir()], "nothing was begun"


def test_the_first_model_suits_the_data_and_the_users_words_have_the_last_say() -> None:
    digits = DigitsConfig().build()
    assert host_for(digits) == "cnn" and start_words(digits, []) == ["model=cnn", "model.channels=[4,8]"]
    assert start_words(digits, ["model=mlp"]) == [] and start_words(digits, ["model.channels=[8]"]) == ["model=cnn"]
    assert [one.key for one in settings_space(["optimizer.lr=0.1"]).dimensions] == ["optimizer.weight_decay", "length"]


def test_each_widening_that_is_kept_doubles_the_next() -> None:
    from esper.auto.moves import Growth

    units = [growth_words(Growth("width", 1.0, 1.0), MLPConfig(width=16), widened, 2)[1] for widened in range(3)]
    assert units == ["blueprint.units=16", "blueprint.units=32", "blueprint.units=64"]
    assert growth_words(Growth("train", 1.0, 1.0), MLPConfig(), 0, 2) == ["controller=none"]


def test_a_larger_host_is_the_next_doubling_with_more_parameters() -> None:
    task = DigitsConfig().build()
    host, count = larger_host(MLPConfig(width=16), task, 4_000)  # of width 32: 3,466
    assert host_words(host) == ["model.width=64"] and count == 64 * 64 + 64 + 64 * 64 + 64 + 64 * 10 + 10
    host, count = larger_host(CNNConfig(channels=[4, 8]), task, 1_954)
    assert host_words(host) == ["model.channels=[8,16]"] and count > 1_954
    assert LARGER in kinds_of("cnn") and LARGER not in kinds_of("custom"), "no one knows how a model of the user's own gets wider"
