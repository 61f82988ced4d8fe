"""What Hydra's syntax means to a search."""

from __future__ import annotations

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from esper.compare.search.search import read_words
from esper.errors import UserError
from esper.search.space import Dimension, dimension, shown


def read(word: str) -> Dimension:
    return dimension(OverridesParser.create().parse_overrides([word])[0])


@pytest.mark.parametrize(
    ("word", "found"),
    [
        ("a=x,y", Dimension("a", ("x", "y"))),
        ("a=choice(0.1,0.2)", Dimension("a", ("0.1", "0.2"))),
        ("a=[1,2],[3]", Dimension("a", ("[1,2]", "[3]"))),
        ("a=interval(0,1)", Dimension("a", (), 0.0, 1.0)),
        ("a=int(interval(1,8))", Dimension("a", (), 1, 8, whole=True)),
        ("a=tag(log,interval(1e-4,0.1))", Dimension("a", (), 1e-4, 0.1, log=True)),
        ("a=tag(log,int(interval(1,100)))", Dimension("a", (), 1, 100, log=True, whole=True)),
        ("a=range(16,65,16)", Dimension("a", (), 16, 64, 16, whole=True)),
        ("a=range(5,2,-1)", Dimension("a", (), 3, 5, 1, whole=True)),
        ("a=range(0.0,1.0,0.25)", Dimension("a", (), 0.0, 0.75, 0.25)),
    ],
)
def test_a_word_is_the_dimension_that_hydra_users_expect(word: str, found: Dimension) -> None:
    assert read(word) == found


DRAWN = (
    "a=x,y",
    "a=interval(0,1)",
    "a=tag(log,interval(1e-4,0.1))",
    "a=tag(log,int(interval(1,100)))",
    "a=range(16,65,16)",
    "a=range(0.0,1.0,0.25)",
)


@pytest.mark.parametrize("word", DRAWN)
def test_every_value_that_optuna_draws_is_one_of_the_words(word: str) -> None:
    import optuna

    found = read(word)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(20):
        drawn = study.ask({found.key: found.distribution()}).params[found.key]
        text = found.text(drawn)
        assert text in found.choices if found.choices else found.low <= float(text) <= found.high
        assert found.choices or (float(text) == drawn if found.step or found.whole else abs(float(text) / drawn - 1) < 0.01)
        assert len(text) <= 9, "short enough to be read"
        assert not found.whole or text.isdecimal()
        assert found.step is None or (float(text) - found.low) % found.step == 0


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("a=interval(1,0)", "must not be larger"),
        ("a=tag(log,interval(0,1))", "begins above 0"),
        ("a=tag(log,range(1,9,2))", r"tag\(log, interval"),
        ("a=tag(log,choice(1,2))", "no order"),
        ("a=range(3,3)", "is empty"),
    ],
)
def test_a_word_that_means_nothing_gets_a_sentence(word: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        read(word)


def words(*texts: str) -> tuple[tuple[str, ...], list[str], tuple[int, ...]]:
    found = read_words(OverridesParser.create().parse_overrides(list(texts)))
    return found.fixed, [one.key for one in found.space.dimensions], found.seeds


def test_seeds_are_those_of_every_trial_and_no_dimension() -> None:
    assert words("seed=range(0,3)", "model=mlp", "a.b=1,2") == (("model=mlp",), ["a.b"], (0, 1, 2))
    assert words("seed=3", "a.b=1,2") == (("seed=3",), ["a.b"], ())


@pytest.mark.parametrize(
    ("texts", "sentence"),
    [
        (["model=mlp"], "Nothing to search"),
        (["task=digits,mnist1d"], "task has several values"),
        (["tracking=csv,none", "a=1,2"], "tracking has several values"),
        (["a=1,2", "seed=1,1"], "seed is given twice"),
    ],
)
def test_what_a_search_cannot_choose_gets_a_sentence(texts: list[str], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        words(*texts)


def test_a_number_is_as_fine_as_its_interval_asks_and_never_leaves_it() -> None:
    assert read("a=interval(1000,1001)").text(1000.123456) == "1000.1235"
    assert [read("a=interval(0,0.0012347)").text(value) for value in (0.00100049, 0.0012347)] == ["0.001", "0.0012347"]
    assert [read("a=tag(log,interval(1e-6,0.12345))").text(value) for value in (1.23456e-5, 0.12345)] == ["1.235e-05", "0.12345"]


def test_settings_are_told_without_marks() -> None:
    assert shown({"+a": "64", "b": "[1,2]"}) == "a=64 b=[1,2]"
