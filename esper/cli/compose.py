"""Hydra's composition, with its errors as sentences: the command line becomes a checked ``RootConfig``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from esper import secrets
from esper.cli import conf, overrides
from esper.cli import hydra_settings as internals
from esper.cli.launchers import is_local, keys_of
from esper.cli.machine import refuse_impossible
from esper.cli.preset_files import keys_set_by, refuse_overridden_arm
from esper.config import GROUPS, PRESETS, RootConfig, build, conf_folder, options, structure
from esper.errors import UserError
from esper.search.config import SearchConfig
from esper.search.space import examples
from esper.user_code import variable


@dataclass
class Composed:
    """One composition: the checked config, and how Hydra will run it."""

    config: RootConfig
    multirun: bool
    sweep: dict[str, str]
    tree: DictConfig

    @property
    def folder(self) -> Path:
        """The run's folder, or the sweep's; without a name from the user it is only an example, since Hydra makes up another."""
        HydraConfig.instance().set_config(self.tree)  # what ${hydra:…} refers to
        internals = self.tree.hydra
        return Path(str(internals.sweep.dir if self.multirun else internals.run.dir))


def compose(words: Sequence[str]) -> RootConfig:
    """The checked config of one run.

    Raises:
        UserError: anything in ``words`` that is not accepted.
    """
    with _session():
        parsed = overrides.parse(words)
        overrides.check_single(parsed)
        return _compose(parsed).config


def option(group: str, name: str) -> dict[str, Any]:
    """The settings of an option that ``conf.options`` names, none overridden."""
    with _session():
        tree = hydra.compose("config", [f"{group}={name}"])
        return dict(_values(tree, resolve=False)[group])


def check_jobs(words: Sequence[str], multirun: bool, on_sweep: Callable[[int], None] = lambda threads: None) -> Composed:
    """Composes the runs: the run itself, or the first job of a sweep and one job for every further value; returns the first.

    ``on_sweep`` is called with the threads of each worker once this is known to be a sweep in workers, while most jobs are not composed.

    Raises:
        UserError: anything that is not accepted, before the first job starts.
    """
    with _session():
        parsed = overrides.parse(words)
        composed = _compose(next(_jobs(parsed)))
        if not (multirun or composed.multirun):
            overrides.check_single(parsed)
            return composed
        if _in_workers(composed.tree):
            on_sweep(composed.tree.hydra.launcher.threads)
        typed = {overrides.key_of(override) for override in parsed}
        if searches(composed.tree.hydra):
            _refuse_unfit_launcher(composed.tree.hydra)
        parsed += overrides.parse([f"{key}={value}" for key, value in composed.sweep.items() if key not in typed])
        if not searches(composed.tree.hydra):
            overrides.check_discrete(parsed)
        jobs = _jobs(parsed)
        first = replace(_compose(next(jobs)), multirun=True)
        for job, changed in zip(jobs, _further(parsed), strict=True):
            if overrides.is_group(changed) or overrides.is_hydras(changed):
                _compose(job)
            else:  # a seed in a thousand needs no composition of its own
                _check_value(first.tree, changed)
        return first


def from_hydra(tree: DictConfig, choices: dict[str, Any]) -> RootConfig:
    """The checked config from Hydra's composed tree and the options that it chose by group."""
    return build(_values(tree, resolve=True), {preset: choices.get(preset) for preset in PRESETS})


def _values(tree: DictConfig, resolve: bool) -> dict[str, Any]:
    """Everything but Hydra's own node, as plain values."""
    own = OmegaConf.create({key: tree._get_node(key) for key in tree if key != "hydra"})
    values = OmegaConf.to_container(own, resolve=resolve, throw_on_missing=resolve)
    return {str(key): value for key, value in values.items()} if isinstance(values, dict) else {}


def prepare_hydra() -> None:
    """Give Hydra the options that are not files, and the resolvers of ``${…}``.

    ``${unique:}`` is six characters that distinguish runs of the same name and second; ``${oc.env:}`` reads variables that the user allows.
    """
    from secrets import token_hex

    conf.register()
    OmegaConf.register_new_resolver("unique", lambda: token_hex(3), use_cache=True, replace=True)
    OmegaConf.register_new_resolver("oc.env", variable, replace=True)


@contextmanager
def _session() -> Iterator[None]:
    """Hydra's loader over ``conf/``; its exceptions become sentences."""
    GlobalHydra.instance().clear()
    prepare_hydra()
    try:
        with hydra.initialize_config_dir(str(conf_folder()), version_base="1.3", job_name="esper"):
            for own in conf.own():
                _also(own)
            yield
    except (HydraException, OmegaConfBaseException) as error:
        sentence, _, where = " ".join(str(error).split()).partition(" full_key: ")
        key = f" (in {where.split()[0]})" if where else ""
        raise UserError(f"The configuration cannot be composed: {sentence}{key}") from error


def _also(folder: Path) -> None:
    """Let Hydra's loader look into a folder of the user's own too, after esper's."""
    loader: Any = GlobalHydra.instance().config_loader()
    loader.get_search_path().prepend("own", f"file://{folder}", anchor="schema")
    loader.repository.initialize_sources(loader.get_search_path())


def _jobs(parsed: list[Override]) -> Iterator[list[Override]]:
    """One job with every sweep's first value, then one for each further value."""
    choices = [_values_of(item) if item.is_sweep_override() else [None] for item in parsed]

    def job(changed: int, value: Any) -> list[Override]:
        chosen = [value if i == changed else values[0] for i, values in enumerate(choices)]
        pairs = zip(parsed, chosen, strict=True)
        return [item if text is None else _with_value(item, text) for item, text in pairs]

    yield job(-1, None)
    for index, values in enumerate(choices):
        for value in values[1:]:
            yield job(index, value)


def _values_of(item: Override) -> list[str]:
    """The values to check of an override that has several: all of them, or the ends of an interval or range of numbers."""
    return list(examples(item) if item.is_interval_sweep() else item.sweep_string_iterator())


def _further(parsed: list[Override]) -> Iterator[Override]:
    """The override that the jobs of ``_jobs`` after the first differ in."""
    for item in parsed:
        if item.is_sweep_override():
            for text in _values_of(item)[1:]:
                yield _with_value(item, text)


def _check_value(tree: DictConfig, item: Override) -> None:
    """Refuses a value of a setting, the rest of the configuration being as composed."""
    changed = OmegaConf.masked_copy(tree, [str(key) for key in tree if key != "hydra"])
    with open_dict(changed):
        OmegaConf.update(changed, overrides.key_of(item), item.value(), merge=False)
    refuse_impossible(changed, here=internals.runs_here(tree.hydra))
    from_hydra(changed, dict(tree.hydra.runtime.choices))


def _with_value(sweep: Override, text: str) -> Override:
    return overrides.parse([f"{sweep.get_key_element()}={text}"])[0]


def _refuse_unfitting_preset(tree: DictConfig) -> None:
    """Raise UserError where an experiment, arm or debug file sets a key that the chosen option of a group does not have."""
    places = (conf_folder(), *conf.own())
    for preset in PRESETS:
        name = tree.hydra.runtime.choices.get(preset)
        for key in keys_set_by(name, [place / preset for place in places]) if name else ():
            group, _, leaf = key.partition(".")
            kind = options(group).get(tree[group].get("name")) if leaf and group in GROUPS else None
            if kind is not None and leaf.partition(".")[0] not in {field.name for field in fields(kind)}:
                chosen = f"{group}={tree[group].name}"
                raise UserError(f"{preset}={name} sets {key}, and {chosen} has no such key: leave {group} out, or leave {preset} out.")


def _tree(parsed: list[Override]) -> DictConfig:
    """Hydra's composition. If it fails, or keys may be added, groups are composed first, to check the keys against the chosen options."""
    words = [str(item.input_line) for item in parsed]
    if not any(item.is_add() or item.is_force_add() or item.is_delete() for item in parsed):
        with suppress(Exception):  # whatever is wrong is said below, in our words where there are any
            return hydra.compose("config", words, return_hydra_config=True)
    plain = _values(hydra.compose("config", [str(item.input_line) for item in parsed if overrides.is_group(item)]), resolve=False)
    for item in parsed:
        if not overrides.is_group(item) and not overrides.is_hydras(item):
            overrides.check_key(item, plain)
    return hydra.compose("config", words, return_hydra_config=True)


def _in_workers(tree: DictConfig) -> bool:
    return is_local(str(tree.hydra.launcher._target_))


def _refuse_unfit_launcher(internals: DictConfig) -> None:
    """Refuse a launcher that cannot run the trials of this search."""
    target, sweeper = str(internals.launcher._target_), internals.sweeper
    if keys_of(target) is None:
        raise UserError("hydra/sweeper=optuna runs its trials with hydra/launcher=local, ray or submitit; leave the other launcher out.")
    if not is_local(target) and sweeper.pruner != "none" and len(sweeper.objectives) == 1:
        raise UserError(
            "hydra/sweeper=optuna ends trials early by what they report while they train, and only jobs of this machine report: add "
            "hydra.sweeper.pruner=none to train every trial to its end, or leave the other launcher out."
        )


def searches(internals: DictConfig) -> bool:
    """Whether the sweeper is esper's search, which draws from intervals too."""
    return str(internals.sweeper._target_).endswith(".OptunaSweeper")


def _compose(parsed: list[Override]) -> Composed:
    """One composition, checked."""
    internals.check_words(parsed)
    for item in parsed:
        if overrides.is_group(item):
            overrides.check_group(item)
    tree = _tree(parsed)
    internals.check_tree(tree.hydra)
    if arm := tree.hydra.runtime.choices.get("arm"):
        typed = [overrides.key_of(item) for item in parsed]
        refuse_overridden_arm(typed, arm, [place / "arm" for place in (conf_folder(), *conf.own())])
    if (keys := keys_of(str(tree.hydra.launcher._target_))) is not None:
        structure(keys, {key: value for key, value in tree.hydra.launcher.items() if key != "_target_"}, "hydra.launcher")
    if searches(tree.hydra):
        settings = OmegaConf.to_container(tree.hydra.sweeper)
        assert isinstance(settings, dict)
        structure(SearchConfig, {str(key): value for key, value in settings.items() if key != "_target_"}, "hydra.sweeper")
    refuse_impossible(tree, here=internals.runs_here(tree.hydra))
    secrets.refuse(_values(tree, resolve=True))  # before any other sentence about what a file sets
    _refuse_unfitting_preset(tree)
    config = from_hydra(tree, dict(tree.hydra.runtime.choices))
    sweep = {str(key): str(value) for key, value in (tree.hydra.sweeper.get("params") or {}).items()}
    return Composed(config, str(tree.hydra.mode).endswith("MULTIRUN"), sweep, tree)
