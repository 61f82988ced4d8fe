"""From plain values to checked dataclasses: what is accepted, and the sentence when it is not."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

import pytest

from esper.config import PRESETS, RootConfig, build, config_hash, did_you_mean, listing, plain, structure
from esper.errors import UserError
from esper.setting_fields import setting


class Mode(Enum):
    FAST = 1
    SLOW = 2


@dataclass
class Inner:
    depth: int = setting(1, low=0)


@dataclass
class Example:
    name: str = "example"
    width: int = setting(8, low=1, high=64, unit="features")
    rate: float = setting(0.1, low=0.0)
    least: float = setting(0.0, high=1.0)
    kind: str = setting("relu", choices=("relu", "gelu"))
    on: bool = True
    mode: Mode = Mode.FAST
    limit: int | None = None
    sizes: list[int] = setting([1], low=1)
    words: list[str] = setting([])
    weights: dict[str, float] = setting({}, low=0.0)
    inner: Inner = field(default_factory=Inner)

    def __post_init__(self) -> None:
        if self.width == 13:
            raise ValueError("13 brings bad luck.")


def test_values_take_the_annotated_types() -> None:
    values = {"width": 4, "rate": 1, "kind": "gelu", "on": False, "mode": "SLOW", "limit": 3, "sizes": [2, 3]}
    example = structure(Example, {**values, "weights": {"a": 2}, "inner": {"depth": 5}, "name": 7}, "group")
    assert example == Example("7", 4, 1.0, 0.0, "gelu", False, Mode.SLOW, 3, [2, 3], [], {"a": 2.0}, Inner(5))
    assert isinstance(example.rate, float) and isinstance(example.weights["a"], float)


@pytest.mark.parametrize(("given", "taken"), [("a", ["a"]), (["a", 1], ["a", "1"]), (0, ["0"])])
def test_one_word_is_a_list_of_one(given: object, taken: list[str]) -> None:
    assert structure(Example, {"words": given}, "g").words == taken


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"width": "x"}, "g.width=x is not accepted: g.width takes a whole number from 1 to 64 [features]."),
        ({"width": 0}, "takes a whole number from 1 to 64"),
        ({"width": 1.5}, "takes a whole number"),
        ({"width": True}, "g.width=true is not accepted"),
        ({"width": None}, "g.width=null is not accepted"),
        ({"rate": -0.1}, "takes a finite number of at least 0.0"),
        ({"least": 2.0}, "takes a finite number of at most 1.0"),
        ({"rate": float("nan")}, "g.rate=nan is not accepted"),
        ({"rate": float("inf")}, "g.rate=inf is not accepted"),
        ({"kind": "gelo"}, "g.kind takes relu or gelu; did you mean gelu?"),
        ({"on": 1}, "takes true or false"),
        ({"mode": "fast"}, "takes FAST or SLOW"),
        ({"sizes": 3}, "takes a list, as in [a,b]"),
        ({"words": True}, "g.words=true is not accepted: g.words takes a text or a list, as in a or [a,b]."),
        ({"words": ""}, "takes a text or a list"),
        ({"sizes": [0]}, "takes a whole number of at least 1"),
        ({"weights": 3}, "takes keys with values"),
        ({"weights": {"a": -1}}, "g.weights.a=-1 is not accepted"),
        ({"inner": 3}, "takes other keys"),
        ({"inner": {"dept": 3}}, "There is no key g.inner.dept: g.inner has depth; did you mean g.inner.depth?"),
        ({"widht": 3}, "did you mean g.width?"),
        ({"width": 13}, "g is not accepted: 13 brings bad luck."),
    ],
)
def test_what_is_not_accepted_is_named_with_what_is(values: dict[str, object], sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        structure(Example, values, "g")
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_groups_are_built_from_their_packages_alone() -> None:
    root = build({"seed": 3, "grafting": {"name": "linear", "ramp": "7%"}}, {"arm": "a", "debug": None})
    assert (root.seed, root.grafting.ramp, root.arm, root.debug) == (3, "7%", "a", "")
    with pytest.raises(UserError, match=r"grafting\.name=liner is not accepted.*did you mean linear\?"):
        build({"grafting": {"name": "liner"}})
    with pytest.raises(UserError, match="grafting=None is no option"):
        build({"grafting": None})


def test_the_hash_sees_what_a_result_depends_on_and_nothing_else() -> None:
    base = build({"grafting": {"name": "linear"}})
    renamed = build({"grafting": {"name": "linear"}, "name": "other", "output": "/else", "tags": ["t"]}, {"arm": "a"})
    assert config_hash(base) == config_hash(renamed)
    others = [build({"seed": 1, "grafting": {"name": "linear"}}), build({"grafting": {"name": "linear", "ramp": "6%"}})]
    assert len({config_hash(config) for config in (base, *others)}) == 3


def test_the_plain_form_builds_the_same_config_again() -> None:
    config = build({"seed": 5, "grafting": {"name": "drift"}, "bus": {"name": "memory", "memory_mb": 2}})
    tree = {key: value for key, value in plain(config).items() if value is not None and key not in PRESETS}
    assert build(tree) == config
    assert plain(RootConfig())["seed"] == 0


def test_words_are_listed_and_the_near_one_found() -> None:
    assert listing(["a"]) == "a" and listing(["a", "b", "c"]) == "a, b or c" and listing([]) == "nothing"
    assert did_you_mean("widht", ["width", "depth"]) == "; did you mean width?"
    assert did_you_mean("q", ["width"]) == "."
