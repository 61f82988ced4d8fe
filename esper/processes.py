"""In which process a part of a run lives: settings that every controller and every tracker shares."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from esper.setting_fields import setting

PLACES = ("internal", "external")
TIMINGS = ("lockstep", "free")


@dataclass
class ControllerPlace:
    """Where a controller decides, and whether the trainer waits for it."""

    name: str = ""
    process: str = setting("internal", choices=PLACES, help="external: decided by `esper control`, in a process of its own")
    timing: str = setting(
        "lockstep", choices=TIMINGS, help="lockstep: decisions count at the next tick, so runs repeat; free: when they come"
    )
    deadline_s: float = setting(
        60.0, low=0.001, unit="s", help="external, lockstep: the run stops, to be resumed, when a decision takes longer"
    )


def chosen(name: str) -> Any:
    """The field by which the names of several trackers survive Hydra's merging of their settings into one group."""
    return setting({name: {}}, help="the names in tracking=[mlflow,csv]; chosen by that, not set")


@dataclass
class TrackerPlace:
    """Where the run's story is written, the Parquet files included."""

    name: str = ""
    process: str = setting("internal", choices=PLACES, help="external: written by `esper track`, in a process of its own")
