"""The interface of a controller, which hears every message of a run and answers each tick with commands."""

from __future__ import annotations

from typing import Any, Protocol

from esper.messages import CONTROLLER, Command, Decided, Message, TickEnded


class Controller(Protocol):
    """Decides which seeds germinate, with which blueprint, and when.

    It knows only the bus's messages. The same messages in the same order lead to the same commands, so that runs repeat.
    """

    def observe(self, message: Message) -> None:
        """Take note of an event, a telemetry message or an acknowledgement."""

    def decide(self, tick: int) -> list[Command]:
        """Commands in answer to everything observed up to ``tick``; the trainer applies them at the next tick."""

    def state(self) -> dict[str, Any]:
        """The controller's memory as plain values for JSON, for a checkpoint."""

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from ``state``."""


def decision(ended: TickEnded) -> Decided:
    """The message that follows the commands of a tick; they count once it has come."""
    return Decided(id=f"{CONTROLLER}-{ended.tick}-decided", tick=ended.tick, epoch=ended.epoch)


def command_id(tick: int, n: int) -> str:
    """Id of the ``n``-th command decided at ``tick``: the same when a resumed run decides it again."""
    return f"{CONTROLLER}-{tick}-{n}"
