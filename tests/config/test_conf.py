"""Every file under conf/ against the dataclass it configures, and every pair of options against each other."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import hydra
import pytest
import yaml
from omegaconf import DictConfig

from esper.cli import conf
from esper.cli.compose import from_hydra, register_resolvers
from esper.config import GROUPS, PRESETS, RootConfig, config_hash, options

#: Values that a file sets otherwise than its dataclass, on purpose: the file's whole point.
DELIBERATE = {("lifecycle", "reference"), ("optimizer", "sgd"), ("scheduler", "warmup_cosine")}

FILES = [(group, name) for group in GROUPS for name in conf.options(group)]


def defaults_of(kind: type) -> dict[str, Any]:
    return dataclasses.asdict(kind())


@pytest.mark.parametrize(("group", "name"), FILES, ids=[f"{group}-{name}" for group, name in FILES])
def test_a_file_has_the_keys_types_and_defaults_of_its_dataclass(group: str, name: str) -> None:
    written = yaml.safe_load((conf.folder() / group / f"{name}.yaml").read_text(encoding="utf-8"))
    kind = options(group)[name]
    expected = {**defaults_of(kind), "name": name}
    assert list(written) == list(expected)
    if (group, name) not in DELIBERATE:
        assert written == expected
        assert [type(value) for value in written.values()] == [type(value) for value in expected.values()]


@pytest.mark.parametrize("group", list(conf.groups()))
def test_every_option_that_a_package_offers_has_a_file(group: str) -> None:
    if group not in PRESETS:
        assert set(options(group)) == set(conf.options(group))


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


def all_pairs(choices: dict[str, list[str]]) -> list[dict[str, str]]:
    """Few combinations in which any two options of any two groups meet (greedy covering array)."""
    options_of = [[(group, name) for name in names] for group, names in choices.items()]
    missing = {frozenset(pair) for two in itertools.combinations(options_of, 2) for pair in itertools.product(*two)}
    rows = []
    while missing:
        row = dict(sorted(min(missing, key=sorted)))
        for group, names in choices.items():
            if group not in row:
                met = {name: sum(frozenset([(group, name), pair]) in missing for pair in row.items()) for name in names}
                row[group] = max(met, key=lambda name: met[name])
        missing -= {frozenset(pair) for pair in itertools.combinations(row.items(), 2)}
        rows.append(row)
    return rows


def test_all_pairs_meets_every_pair() -> None:
    rows = all_pairs({"a": ["1", "2", "3"], "b": ["1", "2"], "c": ["1", "2"]})
    assert {(row["a"], row["b"]) for row in rows} == set(itertools.product("123", "12"))
    assert {(row["b"], row["c"]) for row in rows} == set(itertools.product("12", "12"))
    assert len(rows) < 12


def test_any_two_options_compose_and_validate(composer: Any) -> None:
    """Hydra composes every file once; the pairs are put together from the composed groups and built."""
    groups = {group: conf.options(group) for group in GROUPS if conf.options(group)}
    widest = max(len(names) for names in groups.values())
    trees = [composer([f"{group}={names[i % len(names)]}" for group, names in groups.items()]) for i in range(widest)]
    by_option = {(group, tree[group].name): tree[group] for tree in trees for group in groups}
    assert len(by_option) == sum(len(names) for names in groups.values())
    for row in all_pairs(groups):
        tree = {key: trees[0][key] for key in conf.root_keys()} | {pair[0]: by_option[pair] for pair in row.items()}
        config = from_hydra(DictConfig(tree), {})
        assert {group: getattr(config, group).name for group in row} == row
        assert len(config_hash(config)) == 64


@pytest.mark.parametrize(("preset", "name"), [(preset, name) for preset in PRESETS for name in conf.options(preset)])
def test_every_preset_composes_and_validates(composer: Any, preset: str, name: str) -> None:
    config = from_hydra(composer([f"{preset}='{name}'"]), {preset: name})
    assert getattr(config, preset) == name
