"""A member of a consumer group on a server: redelivery counts, claims and dead letters are the server's."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from esper.bus.codec import Envelope, Refused, decode
from esper.bus.config import ServerConfig
from esper.bus.protocol import Counts, Delivery, Id, parse_id
from esper.bus.server import keys, scripts
from esper.bus.server.claim_check import Gone, check_out
from esper.bus.server.connection import is_other_type
from esper.bus.server.group_position import acknowledged, given
from esper.bus.server.payloads import Leaving, Payloads
from esper.bus.telemetry_codec import unpacked
from esper.messages import ClaimCheck, Telemetry

if TYPE_CHECKING:
    import redis

DISCOVER_S = 0.2  # how often a consumer looks for new producers of its stream
REMEMBERED = 65_536  # acknowledged ids kept to recognise one that comes again
CAME_LATE = (
    "the group {group!r} came to the {stream} after large messages of it were removed, since all other groups had acknowledged them:"
    " it is not given these, and they count as gaps"
)


@dataclass
class Held:
    """Where a handed-out message lies: key of its stream, entry id there, and its stored payload if it has one."""

    key: str
    entry: bytes
    digest: str = ""
    kept: bool = False  # see Consumer.keep


class ServerConsumer:
    """Reads one stream of one run, all its producers, as member ``name`` of ``group``."""

    def __init__(
        self,
        client: redis.Redis,
        patient: redis.Redis,
        config: ServerConfig,
        counts: Counts,
        payloads: Path,
        stream: str,
        run: str,
        group: str,
        name: str,
        incident: Callable[[str, str], None],
    ) -> None:
        self._client, self._patient = client, patient  # without and with retries
        self._config, self._counts, self._incident = config, counts, incident
        self._payloads = Payloads(patient, payloads, run)
        self._leaving = Leaving(self._payloads, stream)
        self._stream, self._run, self.group, self.name = stream, run, group, name
        self.answered = True
        self._bury = patient.register_script(scripts.BURY)
        self._renew = client.register_script(scripts.RENEW)
        self._between = patient.register_script(scripts.BETWEEN)
        self._keys: dict[str, str] = {}  # key -> producer
        self._not_streams: set[str] = set()
        self._recover: dict[str, str] = {}  # key -> where reading of our own pending entries stands
        self._recovered: set[str] = set()  # keys read through so once: what is pending there now was handed to this life
        self._owed: dict[tuple[str, bytes], int] = {}  # key and entry -> which delivery it is, kept until a read went well
        self._held: dict[tuple[str, str], Held] = {}
        self._done: OrderedDict[tuple[str, str], None] = OrderedDict()
        self._fresh: list[tuple[str, str]] = []  # what the read that is going on has taken
        self._unsent: dict[str, list[bytes]] = {}  # acknowledgements the server has not taken yet
        self._position: dict[str, Id] = {}
        self._handled: dict[str, Id] = {}  # by producer
        self._next_discovery = self._next_claim = 0.0
        self._said_gone = False
        self._lock = threading.Lock()

    # --- the contract ---

    def read(self, count: int = 100, block_s: float = 0.0) -> list[Delivery]:
        """Up to ``count`` messages, waiting at most ``block_s`` s for the first; none while the server is away."""
        import redis

        deadline = time.monotonic() + block_s
        while True:
            self._fresh.clear()
            self.answered = True
            try:
                found = self._read(count, max(0.0, deadline - time.monotonic()))
            except (redis.ConnectionError, redis.TimeoutError):
                self._counts.add("retries")
                self._start_over()
                found, self.answered = [], False
                time.sleep(max(0.0, min(0.05, deadline - time.monotonic())))
            except redis.ResponseError as error:
                if not any(word in str(error) for word in ("NOGROUP", "UNBLOCKED", "WRONGTYPE")):
                    raise
                self._keys.clear()  # the server came back without our group, or a key was replaced: look anew
                self._start_over()
                found, self.answered = [], False
            else:
                if not self._recover:  # all that was owed is in hands
                    self._owed.clear()
            if found or time.monotonic() >= deadline:
                self._counts.add("received", len(found))
                return found

    def ack(self, deliveries: list[Delivery]) -> None:
        """Acknowledge after handling; what the server does not take now is sent with the next read."""
        with self._lock:
            for delivery in deliveries:
                name = (delivery.producer, delivery.id)
                held = self._held.pop(name, None)
                if held is None:
                    continue
                self._done[name] = None
                self._unsent.setdefault(held.key, []).append(held.entry)
                if held.digest:
                    self._leaving.add(*name, held.digest)
            while len(self._done) > REMEMBERED:
                self._done.popitem(last=False)
        self._send_acks()
        if deliveries:
            self._counts.add("acknowledged", len(deliveries))

    def keep(self, deliveries: list[Delivery], on: bool = True) -> None:
        """Handling these takes long: while this consumer reads, nobody is given them, until told otherwise."""
        with self._lock:
            for delivery in deliveries:
                if held := self._held.get((delivery.producer, delivery.id)):
                    held.kept = on

    def handled(self) -> dict[str, Id]:
        """By producer, up to where the group had acknowledged all when this member found its stream."""
        return self._handled

    def close(self) -> None:
        """Send acknowledgements that still wait; the rest stays pending for others."""
        self._send_acks()
        self._client.close()
        self._patient.close()

    # --- reading ---

    def _read(self, count: int, block_s: float) -> list[Delivery]:
        now = time.monotonic()
        if not self._keys:
            self._join(self._client.smembers(keys.producers(self._run, self._stream)))
        if self._unsent or self._leaving:
            self._send_acks()
        found: list[Delivery] = []
        while self._recover and not found:  # all of them come before anything new, or the order would be lost
            found = self._own(count)
        if not found and now >= self._next_claim:
            found = self._claim(count)
        return found or self._new(count, block_s)

    def _join(self, producers: set[bytes]) -> None:
        """Join the group on the streams of all ``producers`` and on the replayed dead letters."""
        import redis

        self._next_discovery = time.monotonic() + DISCOVER_S
        wanted = {keys.entries(self._run, self._stream, name): name for name in keys.names(producers)}
        wanted[keys.replays(self._run, self._stream, self.group)] = ""
        for key in sorted(wanted.keys() - self._keys.keys()):
            try:
                self._client.xgroup_create(key, self.group, id="0", mkstream=True)
            except redis.ResponseError as error:
                if is_other_type(error):  # somebody announced a producer whose key is no stream
                    self._counts.add("refused", key not in self._not_streams)
                    self._not_streams.add(key)  # and is asked again: it may become one
                    continue
                if "BUSYGROUP" not in str(error):
                    raise
            self._position[key] = given(self._client, key, self.group)
            self._handled.setdefault(wanted[key], acknowledged(self._client, key, self.group, self._position[key]))
            self._recover[key] = "-"
            self._keys[key] = wanted[key]  # last: a connection that breaks before leaves nothing half joined

    def _start_over(self) -> None:
        """After a broken connection: replies may be lost, so look through our own pending entries again."""
        for name in self._fresh:  # taken by the read that broke off, so in nobody's hands yet
            self._held.pop(name, None)
        self._recover = dict.fromkeys(self._keys, "-")
        self._next_discovery = 0.0

    def _own(self, count: int) -> list[Delivery]:
        """Entries pending under our name that are not in somebody's hands in this process.

        What is in hands is left alone, or every broken connection would count as one more delivery of it. What an earlier life
        left has one delivery more than it says. What this life was given in a reply that got lost has none: nobody saw it.
        """
        found: list[Delivery] = []
        for key in list(self._recover):
            pending = self._client.xpending_range(key, self.group, self._recover[key], "+", count, self.name)
            if not pending:
                del self._recover[key]
                self._recovered.add(key)
                continue
            self._recover[key] = f"({pending[-1]['message_id'].decode()}"
            in_hands = {held.entry for held in self._held.values() if held.key == key}
            more = key not in self._recovered
            times = {
                entry["message_id"]: self._owed.setdefault((key, entry["message_id"]), entry["times_delivered"] + more)
                for entry in pending
                if entry["message_id"] not in in_hands
            }
            claimed: list[tuple[bytes, Any]] = []
            for count_now in sorted(set(times.values())):  # the number is said, so that asking again changes nothing
                ids = [id for id in times if times[id] == count_now]
                claimed += self._client.xclaim(key, self.group, self.name, 0, ids, retrycount=count_now)
            entries = sorted(((id, fields) for id, fields in claimed if id is not None), key=lambda entry: parse_id(entry[0]))
            found += self._deliver(key, entries, times)
        return found

    def _claim(self, count: int) -> list[Delivery]:
        """Take over what any member has held longer than ``claim_s``, and go on holding what this one keeps."""
        idle = int(self._config.claim_s * 1000)
        self._go_on_keeping()
        found: list[Delivery] = []
        for key in self._keys:
            start: Any = "0-0"
            while len(found) < count:
                reply = self._client.xautoclaim(key, self.group, self.name, idle, start, count=count - len(found))
                entries = [(id, fields) for id, fields in reply[1] if fields]
                if gone := [id for id, fields in reply[1] if not fields]:  # deleted entries, on servers before 7.0
                    self._client.xack(key, self.group, *gone)
                found += self._deliver(key, entries, self._times_delivered(key, entries))
                start = reply[0]
                if start in (b"0-0", "0-0"):
                    break
        if len(found) < count:
            self._next_claim = time.monotonic() + self._config.claim_s / 4
        return found

    def _go_on_keeping(self) -> None:
        with self._lock:
            kept = [held for held in self._held.values() if held.kept]
        for key in {held.key for held in kept} & self._keys.keys():
            self._renew(keys=[key], args=[self.group, self.name, *(held.entry for held in kept if held.key == key)])

    def _new(self, count: int, block_s: float) -> list[Delivery]:
        if not self._keys:
            time.sleep(min(block_s, DISCOVER_S / 4))
            return []
        wait = min(block_s, DISCOVER_S, self._config.claim_s / 4, self._config.timeout_s / 2)
        block = max(1, int(wait * 1000)) if wait > 0 else None
        streams = dict.fromkeys(self._keys, ">")
        if time.monotonic() < self._next_discovery:
            return self._handed_out(self._client.xreadgroup(self.group, self.name, streams, count=count, block=block))
        together = self._client.pipeline(transaction=False)  # no message waits for the other question's answer
        together.smembers(keys.producers(self._run, self._stream))
        together.xreadgroup(self.group, self.name, streams, count=count)
        producers, reply = together.execute(raise_on_error=False)
        if isinstance(reply, Exception):
            raise reply
        found = self._handed_out(reply)
        self._join(producers if isinstance(producers, set) else set())  # no set: it is somebody else's, and who is known is read on
        return found or self._read(count, block_s)

    def _handed_out(self, reply: list[tuple[bytes, list[tuple[bytes, Any]]]] | None) -> list[Delivery]:
        found: list[Delivery] = []
        for key, entries in reply or ():
            self._note_gaps(key.decode(), entries)
            found += self._deliver(key.decode(), entries, {})
        return found

    def _note_gaps(self, key: str, entries: list[tuple[bytes, Any]]) -> None:
        """Count sequence numbers that never came: entries handed out by one read follow one another in the stream."""
        if not self._keys[key]:
            return
        for id, _ in entries:
            epoch, sequence = parse_id(id)
            before = self._position[key]
            missing = sequence - 1 - (before[1] if before[0] == epoch else 0)
            self._position[key] = (epoch, sequence)
            if missing > 0:  # other members of the group may have been given what we did not see
                others = self._between(keys=[key], args=[f"{before[0]}-{before[1]}", id])
                self._counts.add("gaps", max(0, missing - others) if others >= 0 else 0)

    # --- handing out ---

    def _deliver(self, key: str, entries: list[tuple[bytes, Any]], times: dict[bytes, int]) -> list[Delivery]:
        """What can be handed out of these; ``times`` says which delivery it is, where it is not the first."""
        found: list[Delivery] = []
        for id, fields in entries:
            delivery = self._open(key, id, fields, times.get(id, 1))
            if delivery is not None:
                found.append(delivery)
        return found

    def _times_delivered(self, key: str, entries: list[tuple[bytes, Any]]) -> dict[bytes, int]:
        if not entries:
            return {}
        pending = self._client.xpending_range(key, self.group, entries[0][0], entries[-1][0], len(entries), self.name)
        return {entry["message_id"]: entry["times_delivered"] for entry in pending}

    def _open(self, key: str, id: bytes, fields: dict[bytes, bytes], times: int) -> Delivery | None:
        """A delivery, or None when the entry is a duplicate, unreadable or given up on."""
        try:
            envelope = self._envelope(key, id, fields)
            name, digest = (envelope.producer, envelope.id), ""
            if name in self._done and self._keys[key]:
                self._counts.add("duplicates")
                self._unsent.setdefault(key, []).append(id)
                return None
            if isinstance(envelope.body, ClaimCheck):
                digest = envelope.body.digest
                envelope = check_out(self._payloads.folder, envelope)
            message = unpacked(envelope.body) if isinstance(envelope.body, Telemetry) else envelope.body
        except Refused as error:
            if isinstance(error, Gone) and self._payloads.let_go(self._stream, *name, self.group):
                self._pass_over(key, id, name)
                return None
            self._counts.add("refused")
            self._give_up(key, id, fields, times, str(error))
            return None
        if times > self._config.deliveries:
            self._give_up(key, id, fields, times - 1, f"delivered {times - 1} times without an acknowledgement")
            return None
        self._held[name] = Held(key, id, digest)
        self._fresh.append(name)
        return Delivery(envelope.id, message, times, envelope.producer, envelope.time, envelope.after)

    def _pass_over(self, key: str, id: bytes, name: tuple[str, str]) -> None:
        """A large message that all had acknowledged before this group came: as gone as one that was trimmed, and said."""
        self._counts.add("gaps")
        self._done[name] = None
        self._unsent.setdefault(key, []).append(id)
        if not self._said_gone:
            self._said_gone = True
            self._incident("bus_payload_gone", CAME_LATE.format(group=self.group, stream=self._stream))

    def _envelope(self, key: str, id: bytes, fields: dict[bytes, bytes]) -> Envelope:
        wire = fields.get(b"m")
        if wire is None:
            raise Refused("malformed", "a stream entry has no message in it")
        envelope = decode(wire)
        if envelope.run != self._run:
            raise Refused("run", f"a message of run {envelope.run!r} came in on the streams of run {self._run!r}")
        producer = self._keys[key]
        if producer and (envelope.producer != producer or envelope.id.encode() != id):
            raise Refused("malformed", "a message does not belong to the stream entry it came in")
        return envelope

    def _give_up(self, key: str, id: bytes, fields: dict[bytes, bytes], times: int, reason: str) -> None:
        import redis

        letter: dict[str, Any] = {
            "m": fields.get(b"m", b""),
            "stream": self._stream,
            "producer": self._keys[key] or fields.get(b"producer", b""),
            "origin": fields.get(b"origin", id),
            "group": self.group,
            "deliveries": times,
            "reason": reason,
        }
        flat = [part for pair in letter.items() for part in pair]
        try:
            if self._bury(keys=[key, keys.dead(self._run)], args=[self.group, id, *flat]):
                self._counts.add("dead_letters")
        except redis.ResponseError as error:
            if not is_other_type(error):
                raise
            self._unsent.setdefault(key, []).append(id)  # or it would come again for ever, and nothing behind it
            self._counts.add("dropped")
            self._incident("bus_key", f"somebody else uses the key of the dead letters, so one is lost ({reason}): {error}")

    # --- acknowledging ---

    def _send_acks(self) -> None:
        import redis

        with self._lock:
            unsent, self._unsent = self._unsent, {}
        try:
            pipeline = self._patient.pipeline(transaction=False)
            for key, entries in unsent.items():
                pipeline.xack(key, self.group, *entries)
            if unsent:
                pipeline.execute()
        except (redis.ConnectionError, redis.TimeoutError):
            self._counts.add("retries")
            with self._lock:
                for key, entries in unsent.items():
                    self._unsent.setdefault(key, []).extend(entries)
            return
        self._leaving.discard()
