"""Commands on their way into the trainer: taken off the server, handed out in due order, finished exactly once."""

from __future__ import annotations

import base64
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from esper.bus.codec import decode_body, encode_body
from esper.bus.protocol import Bus, Consumer, Delivery
from esper.messages import CONTROLLER, Acknowledgement, Command, Decided, EmergencyStop, Message

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
        """Commands of a controller count from its mark on; those for an earlier start of the trainer never do."""
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
        """The commands to apply now: emergency stops, then by priority, then in order of arrival; late ones expire."""
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
        """Refuse all commands that were not handed out: none will be applied any more."""
        commands = self._due + self._undecided
        self._due, self._undecided = [], []
        for command in commands:
            self._publish(Acknowledgement(command_id=command.id, status="delivered", tick=tick))
            self.finish(command.id, "refused", reason, tick)

    def state(self) -> dict[str, Any]:
        """The state for a checkpoint, JSON-able: commands not yet handed out and ids already seen."""
        return {
            "due": [base64.b64encode(encode_body(command)).decode() for command in self._due],
            "finished": list(self._finished),
            "decided": self.decided,
            "owed": list(self.asked) if self.decided < self.asked[0] else None,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from ``state``."""
        due = (decode_body(base64.b64decode(text)) for text in state["due"])
        self._due = [command for command in due if isinstance(command, Command)]
        self._open = {command.id: time.time() for command in self._due}
        self._finished = dict.fromkeys(state["finished"])
        self.decided = state["decided"]
        tick, epoch = state["owed"] or (-1, 0)
        self.owed = (tick, epoch)


BLOCK_S = 0.2
AGAIN_S = 1.0
SECOND_CONTROLLER = (
    "a command came over the server in the name of the controller, but this run's own process decides, so it is not applied:"
    " give commands under another name, or start the run with controller.process=external"
)


class Receiver:
    """Reads a consumer until closed; ``taken`` gives the messages that came in, ``wait`` waits for more.

    The trainer goes on after any answer of the server: errors become incidents (code, sentence), and the read is tried again.
    """

    def __init__(self, consumer: Consumer, incident: Callable[[str, str], None]) -> None:
        self._consumer, self._incident = consumer, incident
        self._arrived: deque[Delivery] = deque()
        self._done: deque[Delivery] = deque()
        self._something = threading.Event()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="esper-bus-receiver", daemon=True)
        self._thread.start()

    def taken(self) -> list[Delivery]:
        """The messages that have arrived since the last call."""
        self._something.clear()
        return [self._arrived.popleft() for _ in range(len(self._arrived))]

    def wait(self, seconds: float) -> None:
        """Wait until something has arrived, at most ``seconds``."""
        self._something.wait(seconds)

    def done(self, delivery: Delivery) -> None:
        """Have the thread acknowledge a delivery."""
        self._done.append(delivery)

    def close(self) -> None:
        """Stop reading and send the acknowledgements that wait."""
        self._closing.set()
        self._thread.join()
        self._consumer.close()

    def _run(self) -> None:
        while not self._closing.is_set():
            try:
                found = self._consumer.read(1000, BLOCK_S)
                self._consumer.keep(found)  # a command may wait for its tick longer than others would let it
                self._arrived.extend(found)
                if found:
                    self._something.set()
                self._acknowledge()
            except Exception as error:
                self._incident("bus_receiver", f"commands cannot be read, and it is tried again: {error}")
                self._closing.wait(AGAIN_S)
        self._acknowledge()

    def _acknowledge(self) -> None:
        if self._done:
            self._consumer.ack([self._done.popleft() for _ in range(len(self._done))])


class Safekeeping:
    """Commands that have ended, until nothing can undo their effects; only then does the server forget them.

    A run that is killed goes on from its last checkpoint, which knows nothing of commands that were applied after it. With ``hold`` a
    command is therefore acknowledged when a checkpoint that was taken after its end is on disk, and at once without it.
    """

    def __init__(self, done: Callable[[Delivery], None]) -> None:
        self.hold = False
        self._done = done
        self._ended: list[Delivery] = []
        self._copied: deque[list[Delivery]] = deque()  # of every checkpoint that is on its way to the disk

    def ended(self, delivery: Delivery) -> None:
        """This command needs no answer any more."""
        if self.hold:
            self._ended.append(delivery)
        else:
            self._done(delivery)

    def copied(self) -> None:
        """A checkpoint's state was taken, with all that ended so far in it."""
        if self.hold:
            self._copied.append(self._ended)
            self._ended = []

    def written(self) -> None:
        """The oldest of those is on disk, or a later one: never one whose state was taken after it."""
        for delivery in self._copied.popleft() if self._copied else ():
            self._done(delivery)

    def release(self) -> None:
        """The run has ended and will not continue."""
        for delivery in (*(delivery for batch in self._copied for delivery in batch), *self._ended):
            self._done(delivery)
        self._copied.clear()
        self._ended = []


class CommandIntake:
    """Fills the trainer's ``inbox`` with the commands of this process and, once it is ``opened``, with those on the server.

    A command is acknowledged on the server when it has ended and no kill of the trainer can undo it (``safe``). With a controller in
    this process (not ``external``), commands in the controller's name are refused where they come over the server.
    """

    def __init__(
        self, bus: Bus, run: str, external: bool, acknowledge: Callable[[Acknowledgement], None], refuse: Callable[[str], None]
    ) -> None:
        self.inbox = Inbox(acknowledge, self._ended)
        self.safe = Safekeeping(self._done)
        self._bus, self._run, self._external, self._refuse = bus, run, external, refuse
        self._local = bus.local.consumer("commands", run, "trainer", "trainer")
        self._receiver: Receiver | None = None
        self._unfinished: dict[str, Delivery] = {}

    def open(self) -> None:
        """Take commands off the server as well."""
        self._receiver = Receiver(
            self._bus.consumer("commands", self._run, "trainer", "trainer"),
            lambda code, sentence: self._bus.incidents.append((code, sentence)),
        )

    def wait(self, seconds: float) -> None:
        """Wait until something has come off the server, at most ``seconds``."""
        assert self._receiver is not None
        self._receiver.wait(seconds)

    def receive(self) -> None:
        """Put all that has come in into the inbox."""
        while deliveries := self._local.read(1000):
            for delivery in deliveries:
                self._take(delivery)
            self._local.ack(deliveries)
        for delivery in self._receiver.taken() if self._receiver is not None else ():
            command = delivery.message
            if delivery.producer == CONTROLLER and not self._external:
                self._done(delivery)
                self._refuse_second(command)
                continue
            if isinstance(command, Command) and not isinstance(command, Decided):
                self._unfinished[command.id] = delivery  # acknowledged on the server when it has ended
            else:
                self._done(delivery)
            self._take(delivery)

    def close(self) -> None:
        """Stop reading."""
        self._local.close()
        if self._receiver is not None:
            self._receiver.close()

    def _take(self, delivery: Delivery) -> None:
        if isinstance(delivery.message, Command):
            self.inbox.arrive(delivery.producer, delivery.message, delivery.time)
        else:  # anybody may write there, so anything may come: nothing to obey
            self._bus.counters.add("refused")

    def _refuse_second(self, message: Message) -> None:
        """Say in an alert that a second controller is at work, and count its command; its end is said on the server alone.

        A twin of our own controller uses the same ids: those that are known here end by themselves, once.
        """
        self._bus.counters.add("refused")
        self._bus.incidents.append(("bus_second_controller", SECOND_CONTROLLER))
        if isinstance(message, Command) and not isinstance(message, Decided) and not self.inbox.knows(message.id):
            self._refuse(message.id)

    def _ended(self, command_id: str) -> None:
        delivery = self._unfinished.pop(command_id, None)
        if delivery is None:
            return
        if delivery.producer == CONTROLLER:  # of a run that goes on from a checkpoint, it decides again
            self._done(delivery)
        else:
            self.safe.ended(delivery)

    def _done(self, delivery: Delivery) -> None:
        assert self._receiver is not None
        self._receiver.done(delivery)
