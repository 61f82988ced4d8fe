"""Commands on their way into the trainer: each delivered once, in due order, and finished exactly once."""

from __future__ import annotations

import base64
import time
from collections.abc import Callable
from typing import Any

from esper.bus.codec import decode_body, encode_body
from esper.messages import Acknowledgement, Command, Decided, EmergencyStop

CONTROLLER = "controller"  # the producer whose commands take effect only with the Decided that follows them
REMEMBERED = 10_000  # ids of finished commands kept to recognise a repeated one
FINAL = ("applied", "refused", "expired")


class Inbox:
    """Takes commands as they arrive and hands out those that are due, emergency stops first."""

    def __init__(self, acknowledge: Callable[[Acknowledgement], None], ended: Callable[[str], None] = lambda command_id: None) -> None:
        self._publish = acknowledge
        self._ended = ended  # told the id of every command that needs no second delivery any more
        self._due: list[Command] = []
        self._undecided: list[Command] = []
        self._open: dict[str, float] = {}  # id -> clock time at which it was sent, or came in
        self._finished: dict[str, None] = {}
        self.measure: Callable[[str, float], None] = lambda status, seconds: None
        self.repeated = 0
        self.decided = -1  # last tick the controller has decided on
        self.epoch = 0  # of this start of the trainer, which a Decided must name; 0 where the controller is in its process
        self.asked = (-1, 0)  # tick and epoch of the decision that is waited for
        self.owed = (-1, 0)  # the same of an earlier start, whose checkpoint was taken without that decision

    def arrive(self, producer: str, command: Command, sent: float = 0.0) -> None:
        """Take one command, sent at clock time ``sent``.

        One whose id was seen before is counted in ``repeated`` and otherwise ignored.
        """
        if isinstance(command, Decided):
            self._decide(command)
        elif self.knows(command.id):
            self.repeated += 1
            if command.id in self._finished:
                self._ended(command.id)
        elif producer == CONTROLLER and not isinstance(command, EmergencyStop):
            self._open[command.id] = sent or time.time()
            self._undecided.append(command)
        else:
            self._open[command.id] = sent or time.time()
            self._due.append(command)

    def knows(self, command_id: str) -> bool:
        """Whether a command with this id has arrived, and may have ended."""
        return command_id in self._open or command_id in self._finished

    def _decide(self, mark: Decided) -> None:
        """What a controller sent counts from its mark on; what it decided for an earlier start of the trainer never."""
        if mark.epoch == self.epoch or (mark.tick, mark.epoch) == self.owed:
            self._due += self._undecided
            self.decided = mark.tick
        else:
            for command in self._undecided:
                del self._open[command.id]
        for command in self._undecided:  # a restarted trainer has its controller decide again
            self._ended(command.id)
        self._undecided = []

    def due(self, tick: int) -> list[Command]:
        """What is to be applied now: emergency stops, then by priority, then as they came; too late ones expire."""
        if not self._due:
            return []
        commands, self._due = self._due, []
        commands.sort(key=lambda command: (not isinstance(command, EmergencyStop), -command.priority))
        handed = []
        for command in commands:
            self._publish(Acknowledgement(command_id=command.id, status="delivered", tick=tick))
            if 0 <= command.deadline < tick:
                reason = f"its deadline was tick {command.deadline} and it is tick {tick}"
                self.finish(command.id, "expired", reason, tick)
            else:
                handed.append(command)
        return handed

    def finish(self, command_id: str, status: str, reason: str, tick: int) -> None:
        """Acknowledge the end of a command, which comes exactly once."""
        assert status in FINAL, status
        assert command_id in self._open, f"command {command_id!r} was not handed out or has ended already"
        self.measure(status, max(0.0, time.time() - self._open.pop(command_id)))
        self._finished[command_id] = None
        if len(self._finished) > REMEMBERED:
            del self._finished[next(iter(self._finished))]
        self._publish(Acknowledgement(command_id=command_id, status=status, reason=reason, tick=tick))
        self._ended(command_id)

    def refuse_rest(self, reason: str, tick: int) -> None:
        """End whatever has not been handed out: nothing will be applied any more."""
        commands = self._due + self._undecided
        self._due, self._undecided = [], []
        for command in commands:
            self._publish(Acknowledgement(command_id=command.id, status="delivered", tick=tick))
            self.finish(command.id, "refused", reason, tick)

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs (JSON-able): commands not yet handed out and ids already seen."""
        return {
            "due": [base64.b64encode(encode_body(command)).decode() for command in self._due],
            "finished": list(self._finished),
            "decided": self.decided,
            "owed": list(self.asked) if self.decided < self.asked[0] else None,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from ``state``."""
        self._due = [decode_body(base64.b64decode(text)) for text in state["due"]]
        self._open = {command.id: time.time() for command in self._due}
        self._finished = dict.fromkeys(state["finished"])
        self.decided = state["decided"]
        tick, epoch = state["owed"] or (-1, 0)
        self.owed = (tick, epoch)
