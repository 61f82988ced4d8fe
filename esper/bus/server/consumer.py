"""A member of a consumer group on a server: redelivery counts, claims and dead letters are the server's."""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Set as AbstractSet
from pathlib import Path

from esper.bus.config import ServerConfig
from esper.bus.protocol import Counts, Delivery, Id, parse_id
from esper.bus.server import keys
from esper.bus.server.connection import Address, Client, Entry, Fields, StreamEntries, connect, is_other_type
from esper.bus.server.deliveries import Deliveries
from esper.bus.server.payloads import Payloads

RETRIES = 5  # of a request that may be repeated
DISCOVER_S = 0.2  # how often a consumer looks for new producers of its stream


class ServerConsumer:
    """Reads one stream of one run, all its producers, as member ``name`` of ``group``; large messages lie in ``payloads``."""

    def __init__(
        self,
        address: Address,
        config: ServerConfig,
        counts: Counts,
        payloads: Path,
        stream: str,
        run: str,
        group: str,
        name: str,
        incident: Callable[[str, str], None],
    ) -> None:
        self._client = connect(address, config.timeout_s)
        self._patient = connect(address, config.timeout_s, RETRIES)
        self._config, self._counts = config, counts
        self._stream, self._run, self.group, self.name = stream, run, group, name
        self._deliveries = Deliveries(self._patient, config, counts, Payloads(self._patient, payloads, run), stream, run, group, incident)
        self.answered = True
        self._renew = self._client.register_script(keys.RENEW)
        self._between = self._patient.register_script(keys.BETWEEN)
        self._keys: dict[str, str] = {}  # key -> producer
        self._not_streams: set[str] = set()
        self._recover: dict[str, str] = {}  # key -> where reading of our own pending entries stands
        self._recovered: set[str] = set()  # keys read through once: pending entries there were handed to this life
        self._owed: dict[tuple[str, bytes], int] = {}  # key and entry -> which delivery it is, kept until a read went well
        self._position: dict[str, Id] = {}
        self._handled: dict[str, Id] = {}  # by producer
        self._next_discovery = self._next_claim = 0.0

    # --- the contract ---

    def read(self, count: int = 100, block_s: float = 0.0) -> list[Delivery]:
        """Up to ``count`` messages, waiting at most ``block_s`` s for the first; none while the server is away."""
        import redis

        deadline = time.monotonic() + block_s
        while True:
            self._deliveries.begin_read()
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
        """Acknowledge after handling; acknowledgements that the server does not take now are sent with the next read."""
        self._deliveries.acknowledge(deliveries)
        self._deliveries.send_acknowledgements()
        if deliveries:
            self._counts.add("acknowledged", len(deliveries))

    def keep(self, deliveries: list[Delivery], on: bool = True) -> None:
        """Handling these takes long: while this consumer reads, no other consumer is given them."""
        self._deliveries.keep(deliveries, on)

    def handled(self) -> dict[str, Id]:
        """By producer, up to where the group had acknowledged all when this member found its stream."""
        return self._handled

    def close(self) -> None:
        """Send acknowledgements that still wait; the rest stays pending for others."""
        self._deliveries.send_acknowledgements()
        self._client.close()
        self._patient.close()

    # --- reading ---

    def _read(self, count: int, block_s: float) -> list[Delivery]:
        now = time.monotonic()
        if not self._keys:
            self._join(self._client.smembers(keys.producers(self._run, self._stream)))
        if self._deliveries.unsent:
            self._deliveries.send_acknowledgements()
        found: list[Delivery] = []
        while self._recover and not found:  # all of them come before anything new, or the order would be lost
            found = self._own(count)
        if not found and now >= self._next_claim:
            found = self._claim(count)
        return found or self._new(count, block_s)

    def _join(self, producers: AbstractSet[bytes]) -> None:
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
            self._position[key] = _given(self._client, key, self.group)
            self._handled.setdefault(wanted[key], _acknowledged(self._client, key, self.group, self._position[key]))
            self._recover[key] = "-"
            self._keys[key] = wanted[key]  # last: a connection that breaks before leaves nothing half joined

    def _start_over(self) -> None:
        """After a broken connection: replies may be lost, so look through our own pending entries again."""
        self._deliveries.abandon_read()
        self._recover = dict.fromkeys(self._keys, "-")
        self._next_discovery = 0.0

    def _own(self, count: int) -> list[Delivery]:
        """Entries pending under our name that no caller in this process holds.

        Entries that a caller holds are left alone, or every broken connection would count as one more delivery. An entry that an
        earlier life left counts one delivery more than the server says. One that this life was given in a lost reply counts none,
        since no caller saw it.
        """
        found: list[Delivery] = []
        for key in list(self._recover):
            pending = self._client.xpending_range(key, self.group, self._recover[key], "+", count, self.name)
            if not pending:
                del self._recover[key]
                self._recovered.add(key)
                continue
            self._recover[key] = f"({pending[-1]['message_id'].decode()}"
            in_hands = self._deliveries.in_hands(key)
            more = key not in self._recovered
            times = {
                entry["message_id"]: self._owed.setdefault((key, entry["message_id"]), entry["times_delivered"] + more)
                for entry in pending
                if entry["message_id"] not in in_hands
            }
            claimed: list[tuple[bytes | None, Fields]] = []
            for count_now in sorted(set(times.values())):  # with the number given, a repeated request changes nothing
                ids = [id for id in times if times[id] == count_now]
                claimed += self._client.xclaim(key, self.group, self.name, 0, ids, retrycount=count_now)
            entries = sorted(((id, fields) for id, fields in claimed if id is not None), key=lambda entry: parse_id(entry[0]))
            found += self._deliveries.open(key, self._keys[key], entries, times)
        return found

    def _claim(self, count: int) -> list[Delivery]:
        """Take over entries that any member has held longer than ``claim_s``, and renew those that this one keeps."""
        idle = int(self._config.claim_s * 1000)
        self._go_on_keeping()
        found: list[Delivery] = []
        for key in self._keys:
            start: str | bytes = "0-0"
            while len(found) < count:
                reply = self._client.xautoclaim(key, self.group, self.name, idle, start, count=count - len(found))
                entries = [(id, fields) for id, fields in reply[1] if fields]
                if gone := [id for id, fields in reply[1] if not fields]:  # deleted entries, on servers before 7.0
                    self._client.xack(key, self.group, *gone)
                found += self._deliveries.open(key, self._keys[key], entries, self._times_delivered(key, entries))
                start = reply[0]
                if start in (b"0-0", "0-0"):
                    break
        if len(found) < count:
            self._next_claim = time.monotonic() + self._config.claim_s / 4
        return found

    def _times_delivered(self, key: str, entries: list[Entry]) -> dict[bytes, int]:
        if not entries:
            return {}
        pending = self._client.xpending_range(key, self.group, entries[0][0], entries[-1][0], len(entries), self.name)
        return {entry["message_id"]: entry["times_delivered"] for entry in pending}

    def _go_on_keeping(self) -> None:
        for key, entries in self._deliveries.kept().items():
            if key in self._keys:
                self._renew(keys=[key], args=[self.group, self.name, *entries])

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
        self._join(producers if isinstance(producers, set) else set())  # no set: the key is a stranger's, and known producers are read on
        return found or self._read(count, block_s)

    def _handed_out(self, reply: StreamEntries | None) -> list[Delivery]:
        found: list[Delivery] = []
        for key, entries in reply or ():
            name = key.decode()
            self._note_gaps(name, entries)
            found += self._deliveries.open(name, self._keys[name], entries, {})
        return found

    def _note_gaps(self, key: str, entries: list[Entry]) -> None:
        """Count sequence numbers that never came: entries handed out by one read follow one another in the stream."""
        if not self._keys[key]:
            return
        for id, _ in entries:
            epoch, sequence = parse_id(id)
            before = self._position[key]
            missing = sequence - 1 - (before[1] if before[0] == epoch else 0)
            self._position[key] = (epoch, sequence)
            if missing > 0:  # other members of the group may have been given these
                others = self._between(keys=[key], args=[f"{before[0]}-{before[1]}", id])
                self._counts.add("gaps", max(0, missing - others) if others >= 0 else 0)


def _given(client: Client, key: str, group: str) -> Id:
    """The last entry that the group was given."""
    for found in client.xinfo_groups(key):
        if found["name"] == group.encode():
            return parse_id(found["last-delivered-id"])
    return (0, 0)


def _acknowledged(client: Client, key: str, group: str, position: Id) -> Id:
    """The last number before the oldest that waits for its acknowledgement, or else ``position``, the last that was given."""
    if oldest := client.xpending(key, group)["min"]:
        epoch, sequence = parse_id(oldest)
        return epoch, sequence - 1
    return position
