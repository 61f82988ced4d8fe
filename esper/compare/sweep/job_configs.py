"""The configs of a sweep's jobs: Hydra composes once for all jobs that differ in their seed alone."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf, open_dict

from esper.cli import conf

if TYPE_CHECKING:
    from hydra_plugins.esper_workers import WorkersLauncher


def lean(loader: Any) -> None:
    """Let Hydra's loader find the options for runs of a sweep before those of single runs with the same name.

    They are defaults like these: what the user states, in a file or on the command line, has the last word.
    """
    conf.register_for_sweeps()
    path = loader.get_search_path()
    path.prepend("sweep", f"file://{conf.folder() / 'sweep'}")
    loader.repository.initialize_sources(path)


def composed(launcher: WorkersLauncher, overrides: Sequence[str], number: int) -> DictConfig:
    """The tree of job ``number``, ``hydra`` included. A composition takes a tenth of a second, a sweep may have a thousand."""
    seeds = [text.removeprefix("seed=") for text in overrides if text.startswith("seed=")]
    rest = tuple(text for text in overrides if not text.startswith("seed="))
    plain = len(seeds) == 1 and seeds[0].isdecimal() and "override_dirname" not in _subdir(launcher)
    if plain and rest in launcher.composed:
        config = copy.deepcopy(launcher.composed[rest])
    else:
        config = launcher.context.config_loader.load_sweep_config(launcher.config, list(overrides))
        if plain:
            launcher.composed[rest] = copy.deepcopy(config)
    with open_dict(config):
        config.hydra.job.id = config.hydra.job.num = number
        if plain:
            config.seed = int(seeds[0])
    return config


def _subdir(launcher: WorkersLauncher) -> str:
    """The pattern of the jobs' folders; one that spells out the overrides needs each job's own."""
    sweep = OmegaConf.to_container(launcher.config.hydra.sweep, resolve=False)
    assert isinstance(sweep, dict)
    return str(sweep["subdir"])
