"""Where a consumer group stands in a stream on a server."""

from __future__ import annotations

from typing import TYPE_CHECKING

from esper.bus.protocol import Id, parse_id

if TYPE_CHECKING:
    import redis


def given(client: redis.Redis, key: str, group: str) -> Id:
    """The last entry that the group was given."""
    for found in client.xinfo_groups(key):
        if found["name"] == group.encode():
            return parse_id(found["last-delivered-id"])
    return (0, 0)


def acknowledged(client: redis.Redis, key: str, group: str, position: Id) -> Id:
    """The last number before the oldest that waits for its acknowledgement, or else ``position``, the last that was given."""
    if oldest := client.xpending(key, group)["min"]:
        epoch, sequence = parse_id(oldest)
        return epoch, sequence - 1
    return position
