"""``scheduled``: a script of commands, for tests and studies."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from esper.controllers.base import command_id
from esper.controllers.view import RunView, check_duration
from esper.errors import UserError
from esper.lifecycle.stages import Stage
from esper.messages import (
    ApplyTogether,
    Cancel,
    ChangeStrategy,
    Command,
    EmergencyStop,
    Germinate,
    Message,
    PauseGrafting,
    ReplaceBranch,
    RequestReport,
    ResumeGrafting,
    RunStarted,
    Selector,
    SetStage,
)
from esper.processes import ControllerPlace
from esper.setting_fields import setting

_SELECTING = {"cancel": Cancel, "pause": PauseGrafting, "resume": ResumeGrafting}
#: Keys that may stand beside ``at`` and ``command``, by command.
_ACCEPTED = {
    "germinate": ("site", "seeds", "count", "blueprint", "strategy", "objective", "as_one"),
    **dict.fromkeys(_SELECTING, ("site", "seeds", "stage")),
    "set_stage": ("site", "seeds", "stage", "target"),
    "change_strategy": ("site", "seeds", "stage", "strategy"),
    "replace": ("site", "seeds", "blueprint", "start"),
    "emergency_stop": ("reason", "site", "seeds", "stage"),
    "report": (),
}


@dataclass(frozen=True)
class Entry:
    """One line of a script. ``seeds`` None means every seed; ``count`` takes that many DORMANT ones of them.

    ``as_one`` makes one decision of all that germinate.
    """

    at: str
    command: str
    site: str = "*"
    seeds: tuple[int, ...] | None = None
    count: int | None = None
    blueprint: str = ""
    strategy: str = ""
    objective: str = ""
    stage: int | None = None
    target: int = 0
    reason: str = ""
    start: str = "fresh"
    as_one: bool = False

    @property
    def is_glob(self) -> bool:
        """Whether ``site`` is a pattern and no name."""
        return any(mark in self.site for mark in "*?[")


def read_script(script: Sequence[Any]) -> list[Entry]:
    """The entries of a script; raises UserError naming the first that cannot be read, and the accepted forms."""
    return [_read(number, given) for number, given in enumerate(script)]


def _read(number: int, given: Any) -> Entry:
    where = f"controller.script[{number}]"
    if not isinstance(given, Mapping) or "at" not in given or "command" not in given:
        raise UserError(f"{where} is {given!r}; an entry is a dict with at and command, e.g. {{at: 10%, command: germinate}}.")
    command = given["command"]
    if command not in _ACCEPTED:
        raise UserError(f"{where}.command is '{command}'; accepted are {', '.join(_ACCEPTED)}.")
    accepted = ("at", "command", *_ACCEPTED[command])
    for key in given:
        if key not in accepted:
            raise UserError(f"{where} has the key '{key}', which {command} does not take; it takes {', '.join(accepted)}.")
    for key in {"set_stage": ("target",), "change_strategy": ("strategy",)}.get(command, ()):
        if key not in given:
            raise UserError(f"{where} lacks '{key}', which {command} needs.")
    check_duration(str(given["at"]))
    values = {field.name: given[field.name] for field in fields(Entry) if field.name in given}
    values["at"] = str(given["at"])
    if not isinstance(values.get("as_one", False), bool):
        raise UserError(f"{where}.as_one is {values['as_one']!r}; it is true or false.")
    for key in ("stage", "target"):
        if key in values:
            values[key] = _stage(where, key, values[key])
    if values.get("seeds") is not None:
        values["seeds"] = _seeds(where, values["seeds"])
    return Entry(**values)


def _stage(where: str, key: str, given: Any) -> int:
    if isinstance(given, str) and given.upper() in Stage.__members__:
        return int(Stage[given.upper()])
    if isinstance(given, int) and given in list(Stage):
        return given
    raise UserError(f"{where}.{key} is {given!r}; accepted are {', '.join(Stage.__members__)}.")


def _seeds(where: str, given: Any) -> tuple[int, ...]:
    if isinstance(given, str) or not isinstance(given, Sequence) or not all(isinstance(seed, int) for seed in given):
        raise UserError(f"{where}.seeds is {given!r}; give a list of seed numbers, e.g. [0, 1], or leave it out for all.")
    return tuple(given)


def expand(entry: Entry, view: RunView) -> list[Callable[[str], Command]]:
    """The commands of the entry in this run, as functions from a command's id to the command."""
    select = Selector(site=entry.site, seeds=list(entry.seeds) if entry.seeds is not None else None, stage=entry.stage)
    if entry.command == "germinate":
        made = [_germinate(entry, site, seed) for site, seed in _places(entry, view)]
        return [_together(made)] if entry.as_one and made else made
    if entry.command == "replace":
        return [_replace(entry, site, seed) for site, seed in _places(entry, view)]
    if entry.command == "set_stage":
        return [lambda id: SetStage(id=id, select=select, target=entry.target)]
    if entry.command == "change_strategy":
        return [lambda id: ChangeStrategy(id=id, select=select, strategy=entry.strategy)]
    if entry.command == "emergency_stop":
        return [lambda id: EmergencyStop(id=id, reason=entry.reason, select=select)]
    if entry.command == "report":
        return [lambda id: RequestReport(id=id)]
    return [lambda id: _SELECTING[entry.command](id=id, select=select)]


def _places(entry: Entry, view: RunView) -> list[tuple[str, int]]:
    """Seeds to germinate. Seeds that the entry names are asked for even if they do not exist: the trainer gives the reason."""
    sites = [entry.site] if not entry.is_glob else list(dict.fromkeys(site for site, _ in view.seeds(entry.site)))
    if entry.seeds is not None:
        places = [(site, seed) for site in sites for seed in entry.seeds]
    else:
        places = [place for site in sites for place in view.seeds(site)]
    if entry.count is None:
        return places
    dormant = set(view.seeds(stage=Stage.DORMANT))
    return [place for place in places if place in dormant][: entry.count]


def _germinate(entry: Entry, site: str, seed: int) -> Callable[[str], Command]:
    return lambda id: Germinate(id=id, site=site, seed=seed, blueprint=entry.blueprint, strategy=entry.strategy, objective=entry.objective)


def _together(made: list[Callable[[str], Command]]) -> Callable[[str], Command]:
    return lambda id: ApplyTogether(id=id, commands=[make(f"{id}-{number}") for number, make in enumerate(made)], as_one=True)


def _replace(entry: Entry, site: str, seed: int) -> Callable[[str], Command]:
    return lambda id: ReplaceBranch(id=id, site=site, seed=seed, blueprint=entry.blueprint, start=entry.start)


@dataclass
class ScheduledConfig(ControllerPlace):
    """The script: one dict an entry, see ``docs/controllers.md``."""

    name: str = "scheduled"
    script: list[Any] = setting([], help="entries like {at: 10%, command: germinate, site: fc1, seeds: [0, 1]}")

    def build(self, seed: int) -> ScheduledController:
        """The controller; the run's random ``seed`` is not used. Raises UserError for an entry it cannot read."""
        return ScheduledController(read_script(self.script))


class ScheduledController:
    """Sends each entry's commands at the end of the tick the entry names, once."""

    def __init__(self, script: list[Entry]) -> None:
        self.script = script
        self.view = RunView()
        self.sent: set[int] = set()

    def observe(self, message: Message) -> None:
        """Take note of sites and stages; raises UserError when an entry's glob matches no site."""
        self.view.observe(message)
        if isinstance(message, RunStarted):
            for entry in self.script:
                if entry.is_glob and not self.view.seeds(entry.site):
                    raise UserError(
                        f"controller.script names sites '{entry.site}', which match none; "
                        f"there are: {', '.join(self.view.sites) or 'none'}."
                    )

    def decide(self, tick: int) -> list[Command]:
        """Commands of the entries whose time has come, in the order of the script."""
        if not self.view.started:
            return []
        due = [i for i, e in enumerate(self.script) if i not in self.sent and self.view.ticks(e.at) <= tick]
        due.sort(key=lambda i: self.view.ticks(self.script[i].at))
        commands: list[Command] = []
        for i in due:
            for make in expand(self.script[i], self.view):
                commands.append(make(command_id(tick, len(commands))))
        self.sent.update(due)
        return commands

    def state(self) -> dict[str, Any]:
        """JSON-able."""
        return {"view": self.view.state(), "sent": sorted(self.sent)}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from ``state``."""
        self.view.load_state(state["view"])
        self.sent = set(state["sent"])
