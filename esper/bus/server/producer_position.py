"""Where a producer's stream stands on a server on which anybody may have written: nothing of a stranger's counts as stored by us."""

from __future__ import annotations

from typing import TYPE_CHECKING

from esper.bus.codec import Refused, decode
from esper.bus.protocol import Id, id_text, parse_id, read_id
from esper.bus.server import keys, scripts
from esper.bus.server.connection import unless_other_type
from esper.bus.server.outbox import Outbox

if TYPE_CHECKING:
    import redis

PAGE = 500
OCCUPIED = (
    "somebody else wrote to {key}, where only this run writes, and ids of a stream only grow: delete that key, and the messages are sent"
)


class Standing:
    """Asks a server where the streams of producers stand; methods raise redis errors."""

    def __init__(self, client: redis.Redis) -> None:
        self._client = client
        self._note = client.register_script(scripts.NOTE)

    def find(self, outbox: Outbox, stream: str) -> Id | None:
        """The last id of the stream, all of which is the producer's; None where another process writes in its name.

        What the server has noted of it is believed where it says what the producer knows, or what it has just sent and finds
        there; otherwise the stream itself is asked. Raises redis.ResponseError for entries that are not the producer's and keep out
        what it sends next.
        """
        noted = self._noted(outbox, stream)
        known = {outbox.confirmed, *(id for id, _, _ in outbox.sending)}
        if noted in known and all(stored == wire for stored, wire in self._read_back(outbox, stream, noted)):
            return noted
        stands = self._ask(outbox, stream)
        if any(stored not in (None, wire) for stored, wire in self._read_back(outbox, stream, stands)):
            return None
        names = [keys.last(outbox.run, stream, outbox.name), keys.epoch(outbox.run, stream, outbox.name)]
        self._note(keys=names, args=[outbox.epoch, id_text(stands)])
        return stands

    def _noted(self, outbox: Outbox, stream: str) -> Id | None:
        note = unless_other_type(lambda: self._client.get(keys.last(outbox.run, stream, outbox.name)), b"of another type")
        return read_id(b"0-0" if note is None else note)

    def _read_back(self, outbox: Outbox, stream: str, last: Id) -> list[tuple[bytes | None, bytes]]:
        """Of each message that was handed to the server and may be there: what is stored under its id (None: nothing), and its bytes."""
        doubtful = [(id, wire) for id, wire in outbox.batch() if id <= last]
        if not doubtful:
            return []
        key = keys.entries(outbox.run, stream, outbox.name)
        stored = dict(self._client.xrange(key, id_text(doubtful[0][0]), id_text(doubtful[-1][0])))
        return [(stored.get(id_text(id).encode(), {}).get(b"m"), wire) for id, wire in doubtful]

    def _ask(self, outbox: Outbox, stream: str) -> Id:
        import redis

        key = keys.entries(outbox.run, stream, outbox.name)
        if not self._client.exists(key):
            return 0, 0
        start = id_text(outbox.confirmed if outbox.confirmed > (0, 0) else outbox.first)
        while entries := self._client.xrange(key, start, "+", PAGE):
            if any(not _own(outbox, id, fields) for id, fields in entries):
                raise redis.ResponseError(OCCUPIED.format(key=key))
            start = f"({entries[-1][0].decode()}"
        return parse_id(self._client.xinfo_stream(key)["last-generated-id"])


def _own(outbox: Outbox, id: bytes, fields: dict[bytes, bytes]) -> bool:
    try:
        envelope = decode(fields.get(b"m", b""))
    except Refused:
        return False
    return (envelope.run, envelope.producer, envelope.id.encode()) == (outbox.run, outbox.name, id)
