"""Controllers: policies that see bus messages and answer with commands. One a file; see ``docs/controllers.md``."""

from __future__ import annotations

from esper.controllers.bandit import BanditConfig
from esper.controllers.base import Controller, command_id
from esper.controllers.heuristic import HeuristicConfig
from esper.controllers.hierarchical import HierarchicalConfig
from esper.controllers.none import NoneConfig
from esper.controllers.policy import PolicyConfig
from esper.controllers.probe import ProbeConfig
from esper.controllers.random import RandomConfig
from esper.controllers.runner import ControllerRunner
from esper.controllers.scheduled import ScheduledConfig

__all__ = ["CONFIGS", "Controller", "ControllerRunner", "command_id"]

#: Each config builds its controller: ``config.build(seed)``, ``seed`` the run's random seed.
CONFIGS: dict[str, type] = {
    "none": NoneConfig,
    "scheduled": ScheduledConfig,
    "random": RandomConfig,
    "heuristic": HeuristicConfig,
    "bandit": BanditConfig,
    "probe": ProbeConfig,
    "hierarchical": HierarchicalConfig,
    "policy": PolicyConfig,
}
