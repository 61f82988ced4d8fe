"""Exceptions of the user's own parts, contained: each is said once, with its traceback in the log; who repeats them goes."""

from __future__ import annotations

import logging

from esper.engine.port import Port
from esper.lifecycle import Stage
from esper.messages import Alert
from esper.seeds import Branch, SeedRegistry

REPEATED = 3
"""Ticks at which a branch's code, or the strategy that blends it, may raise before the branch goes."""

log = logging.getLogger(__name__)


class Faults:
    """What branches and strategies of one registry raised; ``said`` are the alerts that have been given, saved with the run.

    With ``debug`` nothing is contained: what was caught is raised again, from the line where it came from.
    """

    def __init__(self, registry: SeedRegistry, port: Port, said: set[str], debug: bool) -> None:
        self.registry = registry
        self.port = port
        self.said = said
        self.debug = debug

    def note(self, raised: dict[int, Exception], tick: int, part: str = "") -> dict[int, str]:
        """Count what ``part`` (its blueprint) raised since the last tick, by branch; why those that repeat it must go, in words."""
        gone: dict[int, str] = {}
        for number, error in sorted(raised.items()):
            branch = self.registry.branches[number]
            branch.raised += 1
            what = one_line(error)
            culprit = part or f"blueprint {branch.blueprint}"
            self.say(culprit, branch, error, tick)
            if branch.raised >= REPEATED and branch.stage is not Stage.FOSSILIZED:
                gone[number] = f"exceptions at {branch.raised} ticks; {culprit} raised {what}"
        return gone

    def say(self, part: str, branch: Branch, error: Exception, tick: int) -> None:
        """The alert and the log's traceback, once for each part and kind of exception; in debugging, the exception itself."""
        if self.debug:
            raise error
        key = f"raised {part} {type(error).__name__}"
        if key in self.said:
            return
        self.said.add(key)
        site = self.registry.sites[branch.site].name
        stays = branch.stage is Stage.FOSSILIZED
        then = "stays, and adds nothing when it does" if stays else f"adds nothing when it does, and goes after {REPEATED} ticks of it"
        text = f"{part} raised {one_line(error)} in branch {branch.id} of seed {branch.seed} at {site}; the branch {then}"
        log.error("%s", text, exc_info=error)
        self.port.emit(Alert(tick=tick, level="error", code="part_raised", text=text, site=site, seed=branch.seed))


def one_line(error: Exception) -> str:
    """The exception's class and its message, on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(": ")
