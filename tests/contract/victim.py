"""A consumer in a process of its own, which reads, says what it holds, and waits to be killed; what, it is told as JSON."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from esper.bus.config import RedisConfig
from esper.bus.server.bus import ServerBus
from esper.bus.server.connection import Address


def main(said: str) -> None:
    """Hold so many messages."""
    what = json.loads(said)
    bus = ServerBus(RedisConfig(**what["settings"]), Address(**what["address"]), Path(what["folder"]))
    consumer = bus.consumer("events", what["run"], "group", "dead")
    held = 0
    while held < what["count"]:
        held += len(consumer.read(what["count"] - held, 1.0))
    print("held", flush=True)
    time.sleep(600)


if __name__ == "__main__":
    main(sys.stdin.readline())  # the address has a password in it, which is for no command line
