"""``scheduled``: a script of commands, for tests and studies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from esper.controllers.base import command_id
from esper.controllers.script import Entry, expand, read_script
from esper.controllers.view import RunView
from esper.errors import UserError
from esper.fields import setting
from esper.messages import Command, Message, RunStarted
from esper.processes import ControllerPlace


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
