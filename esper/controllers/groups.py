"""Groups of sites, each with its local controller: the part of a run that it hears, and the proposals that it makes."""

from __future__ import annotations

import base64
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

from esper.bus.codec import decode_body, encode_body
from esper.controllers.base import Controller
from esper.controllers.runner import Contained
from esper.errors import UserError
from esper.messages import (
    Acknowledgement,
    ApplyEach,
    ApplyTogether,
    Command,
    EmergencyStop,
    GateResult,
    Germinate,
    Message,
    ReplaceBranch,
    RunStarted,
    Telemetry,
    Transition,
)

REMEMBERED = 1000
"""Ids of proposals by which a repeated one is recognised."""


@dataclass
class Pending:
    """A proposal to grow that waits for the allocator; ``id`` is the local's, ``cost`` ``[budgets]`` that of the present round."""

    id: str
    command: Command
    cost: Any = None

    def germinations(self) -> list[Germinate]:
        """What would germinate."""
        return germinations(self.command)


@dataclass
class Group:
    """Sites under one local controller, which is here or (None) in another process.

    ``heard`` is the tick of its last word, ``waited`` the rounds in a row in which it wanted something and was granted nothing.
    """

    name: str
    sites: list[str]
    local: Contained | None
    pending: list[Pending] = field(default_factory=list)
    heard: int = 0
    waited: int = 0
    dead: bool = False
    gains: float = 0.0
    ends: int = 0
    held: list[tuple[str, int]] = field(default_factory=list)
    known: list[str] = field(default_factory=list)

    def is_new(self, id: str) -> bool:
        """Whether a proposal has not come before: a process that was killed says its last ones again."""
        if id in self.known:
            return False
        self.known = [*self.known[-REMEMBERED:], id]
        return True

    def view(self, message: Message) -> Message | None:
        """The part of a message that the local controller hears; None where it concerns another group. Its acknowledgements come apart."""
        mine = set(self.sites)
        match message:
            case RunStarted():
                return replace(message, sites=[site for site in message.sites if site["name"] in mine])
            case Telemetry() | GateResult() | Transition():
                return message if message.site in mine else None
            case Acknowledgement():
                return None
        return message

    def state(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "local": None if self.local is None else self.local.state(),
            "pending": [[one.id, written(one.command)] for one in self.pending],
            "held": [list(seed) for seed in self.held],
        } | {name: getattr(self, name) for name in _PLAIN}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from ``state``."""
        if self.local is not None and state["local"] is not None:
            self.local.load_state(state["local"])
        self.pending = [Pending(id, read(text)) for id, text in state["pending"]]
        self.held = [(site, seed) for site, seed in state["held"]]
        for name in _PLAIN:
            setattr(self, name, state[name])


_PLAIN = ("heard", "waited", "dead", "gains", "ends", "known")


def divide(sites: list[str], patterns: list[str]) -> dict[str, list[str]]:
    """Groups by name: the sites that match each glob, the first one counting; every other site is a group of its own.

    Raises UserError for a glob that matches no site which an earlier one has not.
    """
    groups: dict[str, list[str]] = {}
    for pattern in patterns:
        taken = {site for members in groups.values() for site in members}
        groups[pattern] = [site for site in sites if fnmatchcase(site, pattern) and site not in taken]
        if not groups[pattern]:
            raise UserError(f"controller.groups names '{pattern}', which matches no further site; there are: {', '.join(sites)}.")
    taken = {site for members in groups.values() for site in members}
    return groups | {site: [site] for site in sites if site not in taken}


def written(command: Command) -> str:
    """A command as text, for a checkpoint."""
    return base64.b64encode(encode_body(command)).decode()


def read(text: str) -> Command:
    """Inverse of ``written``."""
    command = decode_body(base64.b64decode(text))
    assert isinstance(command, Command)
    return command


def germinations(command: Command) -> list[Germinate]:
    """Every germination in a command."""
    if isinstance(command, ApplyTogether | ApplyEach):
        return [one for part in command.commands for one in germinations(part)]
    return [command] if isinstance(command, Germinate) else []


def confined(command: Command, sites: list[str]) -> Command | None:
    """The command as it concerns these sites alone; None where it names another one, or none of them.

    A glob is written out, site by site, so that a local controller that says ``*`` means its own.
    """
    if isinstance(command, Germinate | ReplaceBranch):
        return command if command.site in sites else None
    if isinstance(command, ApplyTogether | ApplyEach):
        parts = [confined(part, sites) for part in command.commands]
        return replace(command, commands=[part for part in parts if part]) if all(parts) and parts else None
    select = getattr(command, "select", None)
    if select is None:
        return command
    mine = [site for site in sites if fnmatchcase(site, select.site)]
    written = [_at(command, site, number) for number, site in enumerate(mine)]
    if len(written) < 2:
        return replace(written[0], id=command.id) if written else None
    plain = [replace(one, deadline=-1, priority=0) for one in written]
    together = ApplyTogether if not isinstance(command, EmergencyStop) else ApplyEach
    return together(id=command.id, deadline=command.deadline, priority=command.priority, commands=plain)


def _at(command: Any, site: str, number: int) -> Command:
    changed: Command = replace(command, id=f"{command.id}.{number}", select=replace(command.select, site=site))
    return changed


class RemoteLocal:
    """A local controller in a process of its own: it hears the whole run, passes on what concerns its group, and marks its commands."""

    def __init__(self, local: Controller, name: str, patterns: list[str]) -> None:
        self.group = Group(name, [], None)
        self._local, self._patterns, self._mark = local, patterns, f"{name}:"

    def observe(self, message: Message) -> None:
        """Take note of what concerns the group; answers come with the mark that its commands were sent with."""
        if isinstance(message, RunStarted):
            self.group.sites = divide([site["name"] for site in message.sites], self._patterns).get(self.group.name, [])
        if isinstance(message, Acknowledgement) and message.command_id.startswith(self._mark):
            self._local.observe(replace(message, command_id=message.command_id.removeprefix(self._mark)))
        elif (mine := self.group.view(message)) is not None:
            self._local.observe(mine)

    def decide(self, tick: int) -> list[Command]:
        """What the local controller would do."""
        return [replace(command, id=self._mark + command.id) for command in self._local.decide(tick)]

    def state(self) -> dict[str, Any]:
        """JSON-able."""
        return {"sites": self.group.sites, "local": self._local.state()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from ``state``."""
        self.group.sites = list(state["sites"])
        self._local.load_state(state["local"])


def contained(controller: Controller) -> Contained:
    """A local controller whose exceptions cost its own decisions alone."""
    return Contained(controller)
