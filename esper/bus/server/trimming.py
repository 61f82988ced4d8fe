"""Takes acknowledged entries off the server's streams, and nothing that a group has not acknowledged."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from esper.bus.config import ServerConfig
from esper.bus.protocol import parse_id

if TYPE_CHECKING:
    import redis

EVERY_S = 2.0


class Trimmer:
    """Looks at the watched streams every EVERY_S seconds; called from the writer thread."""

    def __init__(self, client: redis.Redis, config: ServerConfig) -> None:
        self._client, self._limit = client, config.keep_mb << 20
        self._keys: list[str] = []
        self._next = 0.0

    def watch(self, key: str) -> None:
        """Keep this stream small."""
        self._keys.append(key)

    def work(self) -> None:
        """Trim the streams that are larger than ``bus.keep_mb``; a server that is away is left for later."""
        import redis

        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + EVERY_S
        try:
            for key in self._keys:
                if (self._client.memory_usage(key) or 0) > self._limit:
                    self.trim(key)
        except redis.RedisError:  # not needed now; the writer itself notices and reports a server that is gone
            return

    def trim(self, key: str) -> None:
        """Remove what every group has acknowledged; a stream without groups is kept whole.

        The last entry stays, as a sign that there were others: who reads from the beginning must notice that it is gone.
        """
        floors = []
        for group in self._client.xinfo_groups(key):
            pending = self._client.xpending(key, group["name"])
            if pending["pending"]:
                floors.append(parse_id(pending["min"]))
            else:
                floors.append(parse_id(group["last-delivered-id"]))
        if floors and min(floors) > (0, 0):
            epoch, sequence = min(floors)
            self._client.xtrim(key, minid=f"{epoch}-{sequence}", approximate=False)

    def close(self) -> None:
        """Close the connection."""
        self._client.close()
