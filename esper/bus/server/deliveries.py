"""The messages that one consumer holds until they are acknowledged or given up."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from esper.bus.codec import Envelope, Refused, decode
from esper.bus.protocol import Counts, Delivery
from esper.bus.server import keys
from esper.bus.server.connection import Client, Entry, Fields, is_other_type
from esper.bus.server.payloads import PayloadGone, Payloads, PendingDiscards, load_payload
from esper.bus.telemetry_codec import unpacked
from esper.messages import ClaimCheck, Telemetry

if TYPE_CHECKING:
    from esper.bus.config import ServerConfig

REMEMBERED = 65_536  # acknowledged ids kept to recognise one that comes again
CAME_LATE = (
    "the group {group!r} came to the {stream} after large messages of it were removed, since all other groups had acknowledged them:"
    " it is not given these, and they count as gaps"
)


@dataclass
class Held:
    """The place of a message that was handed out: key of its stream, entry id there, and its stored payload if it has one."""

    key: str
    entry: bytes
    digest: str = ""
    kept: bool = False  # see Consumer.keep


class Deliveries:
    """Turns the entries of one stream of one run into deliveries to ``group``, and knows which of them are not acknowledged.

    An entry that cannot be handed out is passed over (a duplicate), or becomes a dead letter (unreadable, delivered too often).
    Methods that ask the server raise its errors.
    """

    def __init__(
        self,
        patient: Client,
        config: ServerConfig,
        counts: Counts,
        payloads: Payloads,
        stream: str,
        run: str,
        group: str,
        incident: Callable[[str, str], None],
    ) -> None:
        self._patient, self._config, self._counts, self._incident = patient, config, counts, incident
        self._payloads, self._discards = payloads, PendingDiscards(payloads, stream)
        self._stream, self._run, self._group = stream, run, group
        self._bury = patient.register_script(keys.BURY)
        self._held: dict[tuple[str, str], Held] = {}  # by producer and id
        self._done: OrderedDict[tuple[str, str], None] = OrderedDict()
        self._fresh: list[tuple[str, str]] = []  # taken by the read that is going on
        self._unsent: dict[str, list[bytes]] = {}  # acknowledgements the server has not taken yet
        self._said_gone = False
        self._lock = threading.Lock()

    # --- opening ---

    def begin_read(self) -> None:
        """A read begins: the caller holds all entries that were opened so far."""
        self._fresh.clear()

    def abandon_read(self) -> None:
        """The read broke off: no caller holds the entries that it had taken."""
        for name in self._fresh:
            self._held.pop(name, None)

    def open(self, key: str, producer: str, entries: list[Entry], times: dict[bytes, int]) -> list[Delivery]:
        """The entries under ``key`` that can be handed out.

        ``producer`` is empty for replayed dead letters; ``times`` says which delivery it is, where it is not the first.
        """
        opened = (self._open(key, producer, id, fields, times.get(id, 1)) for id, fields in entries)
        return [delivery for delivery in opened if delivery is not None]

    def in_hands(self, key: str) -> set[bytes]:
        """Entries of a stream that were handed out and not acknowledged."""
        return {held.entry for held in self._held.values() if held.key == key}

    def _open(self, key: str, producer: str, id: bytes, fields: Fields, times: int) -> Delivery | None:
        """A delivery, or None when the entry is a duplicate, unreadable or given up on."""
        try:
            envelope = self._envelope(producer, id, fields)
            name, digest = (envelope.producer, envelope.id), ""
            if name in self._done and producer:
                self._counts.add("duplicates")
                self._unsent.setdefault(key, []).append(id)
                return None
            if isinstance(envelope.body, ClaimCheck):
                digest = envelope.body.digest
                envelope = load_payload(self._payloads.folder, envelope)
            message = unpacked(envelope.body) if isinstance(envelope.body, Telemetry) else envelope.body
        except Refused as error:
            if isinstance(error, PayloadGone) and self._payloads.let_go(self._stream, *name, self._group):
                self._pass_over(key, id, name)
                return None
            self._counts.add("refused")
            self._give_up(key, producer, id, fields, times, str(error))
            return None
        if times > self._config.deliveries:
            self._give_up(key, producer, id, fields, times - 1, f"delivered {times - 1} times without an acknowledgement")
            return None
        self._held[name] = Held(key, id, digest)
        self._fresh.append(name)
        return Delivery(envelope.id, message, times, envelope.producer, envelope.time, envelope.after)

    def _envelope(self, producer: str, id: bytes, fields: Fields) -> Envelope:
        wire = fields.get(b"m")
        if wire is None:
            raise Refused("malformed", "a stream entry has no message in it")
        envelope = decode(wire)
        if envelope.run != self._run:
            raise Refused("run", f"a message of run {envelope.run!r} came in on the streams of run {self._run!r}")
        if producer and (envelope.producer != producer or envelope.id.encode() != id):
            raise Refused("malformed", "a message does not belong to the stream entry it came in")
        return envelope

    def _pass_over(self, key: str, id: bytes, name: tuple[str, str]) -> None:
        """Skip a large message that all others had acknowledged before this group came, as a gap; the first one is reported."""
        self._counts.add("gaps")
        self._done[name] = None
        self._unsent.setdefault(key, []).append(id)
        if not self._said_gone:
            self._said_gone = True
            self._incident("bus_payload_gone", CAME_LATE.format(group=self._group, stream=self._stream))

    def _give_up(self, key: str, producer: str, id: bytes, fields: Fields, times: int, reason: str) -> None:
        """Make the entry a dead letter."""
        import redis

        letter: dict[str, bytes | str | int] = {
            "m": fields.get(b"m", b""),
            "stream": self._stream,
            "producer": producer or fields.get(b"producer", b""),
            "origin": fields.get(b"origin", id),
            "group": self._group,
            "deliveries": times,
            "reason": reason,
        }
        flat = [part for pair in letter.items() for part in pair]
        try:
            if self._bury(keys=[key, keys.dead(self._run)], args=[self._group, id, *flat]):
                self._counts.add("dead_letters")
        except redis.ResponseError as error:
            if not is_other_type(error):
                raise
            self._unsent.setdefault(key, []).append(id)  # or it would come again for ever, and nothing behind it
            self._counts.add("dropped")
            self._incident("bus_key", f"somebody else uses the key of the dead letters, so one is lost ({reason}): {error}")

    # --- keeping and acknowledging ---

    def keep(self, deliveries: list[Delivery], on: bool) -> None:
        """Mark these as kept, or not any more; see ``Consumer.keep``."""
        with self._lock:
            for delivery in deliveries:
                if held := self._held.get((delivery.producer, delivery.id)):
                    held.kept = on

    def kept(self) -> dict[str, list[bytes]]:
        """Entries that are kept, by the key of their stream."""
        found: dict[str, list[bytes]] = {}
        with self._lock:
            for held in self._held.values():
                if held.kept:
                    found.setdefault(held.key, []).append(held.entry)
        return found

    def acknowledge(self, deliveries: list[Delivery]) -> None:
        """Note these as handled; ``send_acknowledgements`` tells the server."""
        with self._lock:
            for delivery in deliveries:
                name = (delivery.producer, delivery.id)
                held = self._held.pop(name, None)
                if held is None:
                    continue
                self._done[name] = None
                self._unsent.setdefault(held.key, []).append(held.entry)
                if held.digest:
                    self._discards.add(*name, held.digest)
            while len(self._done) > REMEMBERED:
                self._done.popitem(last=False)

    @property
    def unsent(self) -> bool:
        """Whether acknowledgements, or payloads to be removed with them, wait for the server."""
        return bool(self._unsent or self._discards)

    def send_acknowledgements(self) -> None:
        """Send the acknowledgements that wait; where the server does not answer they wait on."""
        import redis

        with self._lock:
            unsent, self._unsent = self._unsent, {}
        try:
            pipeline = self._patient.pipeline(transaction=False)
            for key, entries in unsent.items():
                pipeline.xack(key, self._group, *entries)
            if unsent:
                pipeline.execute()
        except (redis.ConnectionError, redis.TimeoutError):
            self._counts.add("retries")
            with self._lock:
                for key, entries in unsent.items():
                    self._unsent.setdefault(key, []).extend(entries)
            return
        self._discards.discard()
