"""What a run is called and what its tracker is told beforehand."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from esper.cli import conf
from esper.config import GROUPS, RootConfig, config_hash, options, plain
from esper.running.environment import git_state
from esper.tasks.base import SETS, Task
from esper.tracking import DatasetInfo, RunInfo, differences, readable_name

#: Groups whose option every run states, so that columns can be filtered by them.
CHOSEN = ("model", "task", "controller", "blueprint", "grafting")


def run_record(config: RootConfig, task: Task, folder: Path, started_ms: int) -> RunInfo:
    """The identity of a run: name, tags, data set, and the parameters that differ from the defaults."""
    tree = plain(config)
    changed = differences(tree, _defaults(config))
    chosen = {group: _called(getattr(config, group)) for group in CHOSEN}
    usual = f"{config.model.name}-{config.task.name}"
    what = f"{chosen['model']}-{chosen['task']}" if config.name == usual else config.name
    git = git_state()
    sizes = {which: len(getattr(task, which)) for which in SETS}
    tags = {
        "config_hash": config_hash(config),
        "git_commit": git["commit"] + ("+changed" if git["changed"] else ""),
        "seed": str(config.seed),
        "arm": config.arm,
        "experiment": config.experiment,
        "tags": ",".join(config.tags),
    }
    return RunInfo(
        run=folder.name,
        name=readable_name(what, changed | _choices(config, chosen), config.seed, config.arm),
        folder=str(folder),
        outputs=str(Path(config.output).resolve()),
        started_ms=started_ms,
        config=tree,
        changed={key: value for key, value in changed.items() if key not in {f"{group}.name" for group in CHOSEN}},
        chosen=chosen,
        tags={name: value for name, value in tags.items() if value},
        dataset=DatasetInfo(name=task.name, digest=task.digest, description=task.description, sizes=sizes),
        primary=f"validation/{task.primary}",
        direction=task.metrics[task.primary].direction,
    )


def _called(part: Any) -> str:
    """The option of a group; of a part of the user's own the class or function that it names."""
    target = str(getattr(part, "target", ""))
    return target.rpartition(":")[2] or str(part.name)


def _choices(config: RootConfig, chosen: dict[str, str]) -> dict[str, str]:
    """The options, of all groups, that are not the ones of conf/config.yaml, as settings of a run's name."""
    usual = conf.defaults()
    names = {group: chosen.get(group) or str(getattr(getattr(config, group), "name", usual[group])) for group in usual}
    return {f"{group}.name": name for group, name in names.items() if name != usual[group]}


def _defaults(config: RootConfig) -> dict[str, Any]:
    """What the files under ``conf/`` say when nothing is overridden, as the dataclasses hold it."""
    tree = dataclasses.asdict(RootConfig()) | {"name": config.name, "output": config.output}
    for group in GROUPS:
        chosen = getattr(config, group)
        if chosen is not None:
            tree[group] = dataclasses.asdict(options(group)[chosen.name](name=chosen.name))
    return tree
