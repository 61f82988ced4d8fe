"""Every file under conf/ against the dataclass it configures, and every pair of options against each other."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Collection, Iterator
from typing import Any

import hydra
import pytest
import yaml

from esper.cli import conf
from esper.cli.compose import compose, from_hydra, register_resolvers
from esper.compare.sweep.arms import arm_keys
from esper.config import GROUPS, PRESETS, RootConfig, config_hash, options
from esper.errors import UserError

#: Values that a file sets otherwise than its dataclass, on purpose: the file's whole point.
NARROW = {("grafting", "grad_norm_narrow"), ("grafting", "stability_narrow")}
DELIBERATE = {("lifecycle", "reference"), ("model", "mlp_32"), ("optimizer", "sgd"), *NARROW}

FILES = [(group, name) for group in GROUPS for name in conf.options(group)]


def defaults_of(kind: type) -> dict[str, Any]:
    return dataclasses.asdict(kind())


@pytest.mark.parametrize(("group", "name"), FILES, ids=[f"{group}-{name}" for group, name in FILES])
def test_a_file_has_the_keys_types_and_defaults_of_its_dataclass(group: str, name: str) -> None:
    written = yaml.safe_load((conf.folder() / group / f"{name}.yaml").read_text(encoding="utf-8"))
    kind = options(group)[written["name"]]
    expected = {**defaults_of(kind), "name": written["name"]}
    assert list(written) == list(expected)
    if (group, name) not in DELIBERATE:
        assert written == expected
        assert [type(value) for value in written.values()] == [type(value) for value in expected.values()]


def test_a_sweeps_own_options_differ_from_a_single_runs_in_what_is_kept_alone() -> None:
    files = sorted((conf.folder() / "sweep").glob("*/*.yaml"))
    assert [path.relative_to(conf.folder() / "sweep").as_posix() for path in files] == ["tracking/csv.yaml", "tracking/mlflow.yaml"]
    for path in files:
        single = (conf.folder() / "tracking" / path.name).read_text(encoding="utf-8").splitlines()[1:]
        pairs = zip(single, path.read_text(encoding="utf-8").splitlines()[1:], strict=True)
        assert {one.partition(":")[0] for one, other in pairs if one != other} <= {"figures", "model", "system_s"}


@pytest.mark.parametrize("group", list(conf.groups()))
def test_every_option_that_a_package_offers_has_a_file(group: str) -> None:
    if group not in PRESETS:
        assert set(options(group)) <= set(conf.options(group))


def test_the_root_file_has_the_keys_and_defaults_of_the_root() -> None:
    root = RootConfig()
    for key, value in conf.root_keys().items():
        assert key == "name" or getattr(root, key) == value
    names = {field.name for field in dataclasses.fields(RootConfig)}
    assert set(conf.root_keys()) | set(GROUPS) | set(PRESETS) == names


def test_every_group_has_a_default() -> None:
    assert set(conf.defaults()) == set(GROUPS)


@pytest.fixture(scope="module")
def composer() -> Iterator[Any]:
    register_resolvers()
    with hydra.initialize_config_dir(str(conf.folder()), version_base="1.3"):
        yield lambda words: hydra.compose("config", words)


#: Arm -> the groups that its file chooses; choosing them on the command line too is refused (docs/comparing.md).
CHOSEN_BY_ARM = {
    name: [key for key in arm_keys(yaml.safe_load((conf.folder() / "arm" / f"{name}.yaml").read_text()) or {}) if key in GROUPS]
    for name in conf.options("arm")
}
Option = tuple[str, str]


def possible(options_chosen: Collection[Option]) -> bool:
    """Whether no option is chosen for a group that the arm chooses."""
    taken = [group for kind, name in options_chosen if kind == "arm" for group in CHOSEN_BY_ARM.get(name, [])]
    return not any(group in taken for group, _ in options_chosen)


def all_pairs(choices: dict[str, list[str]]) -> list[dict[str, str]]:
    """Few combinations in which any two options of any two groups meet, but for what an arm excludes (greedy covering array)."""
    options_of = [[(group, name) for name in names] for group, names in choices.items()]
    pairs = (pair for two in itertools.combinations(options_of, 2) for pair in itertools.product(*two))
    missing = {frozenset(pair) for pair in pairs if possible(pair)}
    rows = []
    while missing:
        row = dict(sorted(min(missing, key=sorted)))
        for group, names in choices.items():
            fitting = [name for name in names if group not in row and possible([*row.items(), (group, name)])]
            if fitting:
                met = {name: sum(frozenset([(group, name), pair]) in missing for pair in row.items()) for name in fitting}
                row[group] = max(met, key=lambda name: met[name])
        missing -= {frozenset(pair) for pair in itertools.combinations(row.items(), 2)}
        rows.append(row)
    return rows


def test_all_pairs_meets_every_pair() -> None:
    rows = all_pairs({"a": ["1", "2", "3"], "b": ["1", "2"], "c": ["1", "2"]})
    assert {(row["a"], row["b"]) for row in rows} == set(itertools.product("123", "12"))
    assert {(row["b"], row["c"]) for row in rows} == set(itertools.product("12", "12"))
    assert len(rows) < 12


@pytest.mark.slow  # seconds of computing
def test_any_two_options_compose_and_validate(composer: Any) -> None:
    """Of all groups and of all presets, each composed by Hydra as it would be from the command line."""
    choices = {group: names for group, names in conf.groups().items() if names}
    assert set(choices) == {*GROUPS, *PRESETS}
    for row in all_pairs(dict(sorted(choices.items(), key=lambda item: -len(item[1])))):
        tree = composer([f"{group}='{name}'" for group, name in row.items()])
        config = from_hydra(tree, tree_choices(row))
        assert {preset: getattr(config, preset) for preset in PRESETS if preset in row} == tree_choices(row)
        for group in row.keys() - {*PRESETS}:
            written = yaml.safe_load((conf.folder() / group / f"{row[group]}.yaml").read_text(encoding="utf-8"))
            assert getattr(config, group).name == written["name"]
        assert len(config_hash(config)) == 64


def tree_choices(row: dict[str, str]) -> dict[str, str]:
    """The presets of a combination."""
    return {preset: row[preset] for preset in PRESETS if preset in row}


@pytest.mark.parametrize(("arm", "group"), [(arm, group) for arm, groups in CHOSEN_BY_ARM.items() for group in groups])
def test_an_option_of_a_group_that_the_arm_chooses_is_refused_in_words(arm: str, group: str) -> None:
    for name in (conf.options(group)[0], conf.options(group)[-1]):
        with pytest.raises(UserError, match=f"^{group} is set on the command line and by arm '{arm}'.*leave {group} out"):
            compose([f"arm={arm}", f"{group}={name}"])
