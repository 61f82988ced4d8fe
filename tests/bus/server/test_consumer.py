"""A consumer that joins its group while the connection breaks."""

from __future__ import annotations

import time
from collections.abc import Callable

from faults import FaultProxy, FragileServer

from esper.bus.server.bus import ServerBus
from esper.messages import TickEnded


def test_a_reply_lost_at_any_moment_of_joining_costs_nothing(
    fragile: FragileServer, proxy: FaultProxy, open_bus: Callable[..., ServerBus]
) -> None:
    producer = open_bus(fragile.address).producer("events", "run")
    for number in range(3):
        producer.publish(TickEnded(tick=number))
    assert producer.flush(60)
    bus = open_bus(proxy.address, "reader")
    for spare in range(12):  # the members, each stream's group, its position, what waits in it, then the first messages
        consumer = bus.consumer("events", "run", f"group {spare}", "one")
        proxy.reset_after_request(spare=spare)
        seen, deadline = [], time.monotonic() + 60
        while len(seen) < 3 and time.monotonic() < deadline:
            found = consumer.read(100, 0.05)
            consumer.ack(found)
            seen += [delivery.message.tick for delivery in found]
        assert seen == [0, 1, 2], f"{spare} replies came, the next was lost"
